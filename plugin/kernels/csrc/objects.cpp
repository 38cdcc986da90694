// What largebatch/optim/plan.py does in Python, for optimizers of thousands of tensors: see there.

#include "objects.h"

#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "headers.h"
#include "tensors.h"
#include "threads.h"

namespace py = pybind11;

namespace largebatch {

namespace {

PyObject** items_of(const py::list& list) { return PySequence_Fast_ITEMS(list.ptr()); }

// The tensor in a Python object, if attributes of it are those of torch.Tensor itself.
const at::Tensor* plain_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

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

bool same_values_of_all(const py::list& dicts, const py::list& values) {
  const size_t num_dicts = dicts.size(), num_values = values.size();
  PyObject **const dict = items_of(dicts), **const expected = items_of(values);
  size_t seen = 0;
  for (size_t i = 0; i < num_dicts; ++i) {
    if (i + headers_ahead < num_dicts) prefetch_bytes(dict[i + headers_ahead], sizeof(PyDictObject));
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict[i], &position, &key, &value); ++seen)
      if (seen == num_values || value != expected[seen]) return false;
  }
  return seen == num_values;
}

// The gradients; None if another set of tensors lacks one than is expected.
py::object gradients(const py::list& parameters, const std::vector<bool>& lacks_grad) {
  const size_t num_parameters = parameters.size();
  PyObject** const parameter = items_of(parameters);
  TensorList grads(num_parameters);
  std::atomic<bool> are_as_expected{true}, are_plain{true};
  auto take = [&](size_t i, const at::Tensor& grad) {
    grads.tensors[i] = grad;
    if (grad.defined() == lacks_grad[i]) are_as_expected = false;
  };
  in_parallel_ranges(num_parameters, [&](size_t begin, size_t end) {
    auto tensor_at = [&](size_t i) { return i < end ? plain_tensor(parameter[i]) : nullptr; };
    for (size_t i = begin; i < end; ++i) {
      // each of these is found through the one before: object, tensor, what autograd knows of it, gradient
      if (i + 4 * headers_ahead < end) prefetch_bytes(parameter[i + 4 * headers_ahead], 64);
      if (const at::Tensor* tensor = tensor_at(i + 3 * headers_ahead)) prefetch_header(*tensor);
      if (const at::Tensor* tensor = tensor_at(i + 2 * headers_ahead))
        prefetch_bytes(tensor->unsafeGetTensorImpl()->autograd_meta(), 64);
      if (const at::Tensor* tensor = tensor_at(i + headers_ahead))
        prefetch_header(tensor->unsafeGetTensorImpl()->grad());
      if (const at::Tensor* tensor = tensor_at(i)) {
        take(i, tensor->unsafeGetTensorImpl()->grad());
      } else {
        are_plain = false;
      }
    }
  });
  // what another type makes of its attribute is for Python to say, which other threads may not ask
  for (size_t i = 0; i < num_parameters && !are_plain; ++i)
    if (!plain_tensor(parameter[i])) {
      const py::object grad = py::reinterpret_borrow<py::object>(parameter[i]).attr("grad");
      take(i, grad.is_none() ? at::Tensor() : grad.cast<at::Tensor>());
    }
  return are_as_expected ? py::cast(std::move(grads)) : py::none();
}

}  // namespace

void bind_objects(py::module& module) {
  py::class_<TensorList>(module, "TensorList")
      .def("__len__", [](const TensorList& list) { return list.tensors.size(); })
      .def("__getitem__", [](const TensorList& list, size_t i) {
        if (i >= list.tensors.size()) throw py::index_error();
        return list.tensors[i].defined() ? py::cast(list.tensors[i]) : py::none();
      });
  module.def("same_items", &same_items);
  module.def("same_values", &same_values);
  module.def("same_values_of_all", &same_values_of_all);
  module.def("gradients", &gradients);
}

}  // namespace largebatch
