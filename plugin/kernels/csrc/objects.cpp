// What largebatch/optim/plan.py does in Python, for optimizers of thousands of tensors: see there.

#include "objects.h"

#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "headers.h"
#include "tensors.h"
#include "threads.h"

namespace py = pybind11;

namespace largebatch {

namespace {

PyObject** items_of(const py::list& list) { return PySequence_Fast_ITEMS(list.ptr()); }

bool same_items(const py::list& first, const py::list& second) {
  return first.size() == second.size() &&
         std::memcmp(items_of(first), items_of(second), first.size() * sizeof(PyObject*)) == 0;
}

bool same_values(const py::dict& dict, const py::list& values) {
  if (dict.size() != values.size()) return false;
  PyObject** expected = items_of(values);
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value);)
    if (value != *expected++) return false;
  return true;
}

// By several threads, while the caller's one holds the GIL: they only read, and count no references.
bool same_values_of_all(const py::list& dicts, const py::list& values) {
  const size_t num_dicts = dicts.size(), num_values = values.size();
  PyObject **const dict = items_of(dicts), **const expected = items_of(values);
  const int num_threads = num_threads_for_tensors(num_dicts);
  std::vector<size_t> counts(num_threads);  // of values, in each thread's dicts
  std::atomic<bool> is_same{true};
  in_parallel(num_threads, [&](size_t thread, size_t team) {
    const size_t begin = num_dicts * thread / team, end = num_dicts * (thread + 1) / team;
    for (size_t i = begin; i < end; ++i) {
      if (i + headers_ahead < end) prefetch_bytes(dict[i + headers_ahead], sizeof(PyDictObject));
      counts[thread] += PyDict_GET_SIZE(dict[i]);
    }
    barrier(static_cast<int>(team));
    size_t seen = std::accumulate(counts.begin(), counts.begin() + thread, size_t{0});
    if (std::accumulate(counts.begin(), counts.end(), size_t{0}) != num_values) is_same = false;
    PyObject *key, *value;
    for (size_t i = begin; i < end && is_same; ++i)
      for (Py_ssize_t position = 0; PyDict_Next(dict[i], &position, &key, &value);)
        if (value != expected[seen++]) is_same = false;
  });
  return is_same;
}

}  // namespace

void bind_objects(py::module& module) {
  py::class_<TensorList>(module, "TensorList")
      .def("__len__", [](const TensorList& list) { return list.tensors.size(); })
      .def("__getitem__", [](const TensorList& list, size_t i) {
        if (i >= list.tensors.size()) throw py::index_error();
        return list.tensors[i];
      });
  module.def("same_items", &same_items);
  module.def("same_values", &same_values);
  module.def("same_values_of_all", &same_values_of_all);
}

}  // namespace largebatch
