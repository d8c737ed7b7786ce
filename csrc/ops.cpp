// Schemas. The kernels register themselves in cpu/ and cuda/; fakes and the same arithmetic in PyTorch are in
// python/ops/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def(
      "stochastic_round_(Tensor(a!) out, Tensor x, SymInt key, SymInt offset, SymInt start, SymInt width, "
      "SymInt pitch) -> ()");
  m.def(
      "adam_directions_(Tensor(a!)[] rs, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] ages, "
      "float[] biases, int[] keys, int[] places, float beta1, float beta2, float eps, bool maximize) -> ()");
  m.def(
      "split_(Tensor(a!)[] ps, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] lows, int[] shapes, float[] biases, int[] keys, int[] places, int[] moment_keys, "
      "int[] moment_places, bool columns, int outer, float decay, float step, float outside, float beta1, "
      "float beta2, float eps) -> ()");
}

#ifdef USE_CUDA
constexpr const char* devices = "cpu cuda";
#else
constexpr const char* devices = "cpu";
#endif

// Importing slimstate._C is what runs the registrations above and in the kernels' files.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) PyModule_AddStringConstant(module, "DEVICES", devices);
  return module;
}
