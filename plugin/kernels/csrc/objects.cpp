// What largebatch/optim/plan.py does in Python, for optimizers of thousands of tensors: see there.

#include "objects.h"

#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <vector>

#include "headers.h"

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
  auto tensor_at = [&](size_t i) { return i < num_parameters ? plain_tensor(parameter[i]) : nullptr; };
  py::list grads(num_parameters);
  for (size_t i = 0; i < num_parameters; ++i) {
    // each of these is found through the one before: object, tensor, what autograd knows of it, gradient
    if (i + 4 * headers_ahead < num_parameters) prefetch_bytes(parameter[i + 4 * headers_ahead], 64);
    if (const at::Tensor* tensor = tensor_at(i + 3 * headers_ahead)) prefetch_header(*tensor);
    if (const at::Tensor* tensor = tensor_at(i + 2 * headers_ahead))
      prefetch_bytes(tensor->unsafeGetTensorImpl()->autograd_meta(), 64);
    if (const at::Tensor* tensor = tensor_at(i + headers_ahead))
      prefetch_header(tensor->unsafeGetTensorImpl()->grad());

    const at::Tensor* tensor = tensor_at(i);
    py::object grad = tensor ? py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor->unsafeGetTensorImpl()->grad()))
                             : py::reinterpret_borrow<py::object>(parameter[i]).attr("grad");
    if (!grad) throw py::error_already_set();
    if (grad.is_none() != lacks_grad[i]) return py::none();
    PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), grad.release().ptr());
  }
  return grads;
}

}  // namespace

void bind_objects(py::module& module) {
  module.def("same_items", &same_items);
  module.def("same_values", &same_values);
  module.def("same_values_of_all", &same_values_of_all);
  module.def("gradients", &gradients);
}

}  // namespace largebatch
