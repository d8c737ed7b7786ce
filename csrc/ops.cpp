// Schemas. The kernels register themselves in cpu/ and cuda/; fakes and the same arithmetic in PyTorch are in
// python/ops/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def(
      "stochastic_round_(Tensor(a!) out, Tensor x, SymInt key, SymInt offset, SymInt start, SymInt width, "
      "SymInt pitch) -> ()");
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
