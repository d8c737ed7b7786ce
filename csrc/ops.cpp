// Schemas. The kernels register themselves in cpu/ and cuda/; fakes and the same arithmetic in PyTorch are in
// python/ops/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def(
      "stochastic_round_(Tensor(a!) out, Tensor x, SymInt key, SymInt offset, SymInt start, SymInt width, "
      "SymInt pitch) -> ()");
  m.def("sign_residual_(Tensor(a!) w, Tensor g, Tensor product, Tensor limit, float beta, float step) -> ()");
  m.def("scaled_residual_(Tensor(a!) w, Tensor g, Tensor factor, float beta) -> ()");
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
