// Schemas. The kernels register themselves in cpu/ and cuda/; fakes and the same arithmetic in PyTorch are in
// python/ops/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def(
      "stochastic_round_(Tensor(a!) out, Tensor x, SymInt key, SymInt offset, SymInt start, SymInt width, "
      "SymInt pitch) -> ()");
  m.def("hadamard_scores_(Tensor(a!) scores, Tensor m, Tensor? scale, int norm) -> ()");
  m.def("hadamard_down_(Tensor(a!) r, Tensor m, Tensor index) -> ()");
  m.def(
      "hadamard_write_back_(Tensor(a!) w, Tensor index, Tensor u, float alpha, float beta, bool random, SymInt key, "
      "SymInt offset, SymInt start, SymInt width, SymInt pitch) -> ()");
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
