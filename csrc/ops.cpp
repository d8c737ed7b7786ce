// Schemas. The kernels register themselves in cpu/ and cuda/; fakes and the same arithmetic in PyTorch are in
// python/ops/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/clones.h"

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def(
      "stochastic_round_(Tensor(a!) out, Tensor x, SymInt key, SymInt offset, SymInt start, SymInt width, "
      "SymInt pitch) -> ()");
  m.def("hadamard_scores_(Tensor(a!) scores, Tensor m, Tensor? scale, int norm) -> ()");
  m.def("hadamard_down_(Tensor(a!) r, Tensor m, Tensor index) -> ()");
  m.def(
      "hadamard_write_back_(Tensor(a!) w, Tensor index, Tensor u, float alpha, float beta, bool random, SymInt key, "
      "SymInt offset, SymInt start, SymInt width, SymInt pitch) -> ()");
  m.def(
      "hadamard_adam_(Tensor(a!)[] ws, Tensor[] gs, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] ages, Tensor(e!)[] indices, int norm, bool carry, float alpha, float beta, float beta1, "
      "float beta2, float eps, bool maximize) -> ()");
  m.def(
      "adam_directions_(Tensor(a!)[] rs, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] scales, "
      "Tensor[] ages, float[] biases, int[] keys, int[] places, float beta1, float beta2, float eps, bool maximize) -> ()");
  m.def(
      "split_(Tensor(a!)[] ps, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] lows, int[] shapes, float[] biases, int[] keys, int[] places, int[] moment_keys, "
      "int[] moment_places, bool columns, int outer, float decay, float step, float outside, float beta1, "
      "float beta2, float eps) -> ()");
  m.def("encode_(Tensor(a!) codes, Tensor(b!) scale, Tensor x, bool signed, bool columns) -> ()");
  m.def("decode_(Tensor(a!) x, Tensor codes, Tensor scale, bool signed, bool columns) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] ps, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] scales, Tensor(e!)[] lows, float[] biases, int[] keys, int[] places, bool stochastic, "
      "float decay, float lr, float beta1, float beta2, float eps, bool maximize) -> ()");
  m.def("sign_residual_(Tensor(a!) w, Tensor g, Tensor product, Tensor limit, float beta, float step) -> ()");
  m.def("scaled_residual_(Tensor(a!) w, Tensor g, Tensor factor, float beta) -> ()");
  m.def(
      "tangent_dots_(Tensor(a!)[] dots, Tensor[] weights, Tensor[] grads, Tensor[] firsts, Tensor[] seconds, "
      "Tensor[] lows, float[] ages, float rate1, float rate2, float eps, bool nesterov, bool maximize) -> ()");
  m.def(
      "tangent_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, "
      "Tensor(d!)[] lows, Tensor[] factors, int[] keys, int[] places, float[] ages, float lr, float decay, "
      "float rate1, float rate2, float eps, float delta, float wd_ratio, bool nesterov, bool layer_view, "
      "bool maximize, bool stochastic) -> ()");
}

#ifdef USE_CUDA
namespace slimstate {
extern const char* const cuda_architectures;
}
#endif

// Importing slimstate._C is what runs the registrations above and in the kernels' files.
PyMODINIT_FUNC PyInit__C(void) {
  if (!slimstate::machine_suffices()) {
    PyErr_SetString(PyExc_ImportError, "it was built for " SLIMSTATE_LEVEL ", which this machine is not");
    return nullptr;
  }
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef USE_CUDA
  PyModule_AddStringConstant(module, "DEVICES", "cpu cuda");
  PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", slimstate::cuda_architectures);
#else
  PyModule_AddStringConstant(module, "DEVICES", "cpu");
  PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", "");
#endif
#ifdef SLIMSTATE_NATIVE
  PyModule_AddIntConstant(module, "NATIVE", 1);
#else
  PyModule_AddIntConstant(module, "NATIVE", 0);
#endif
  PyModule_AddStringConstant(module, "CPU_LEVEL", slimstate::level_used());
  return module;
}
