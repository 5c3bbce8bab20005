// The module fastattn._C: how tensors come from Python, and the choice of instruction set. Only the files
// csrc/bindings*.cpp know Python, and none knows torch's headers.
//
// To add an op's binding:
//  1. csrc/cpu/kernels.h: the argument struct and the kernel's line in FASTATTN_KERNELS.
//  2. csrc/cpu/<op>.cpp: the kernel. setup.py finds the file and compiles it for every instruction set.
//  3. csrc/bindings_<op>.cpp: a function that takes Tensor (a torch.Tensor or None) and numbers, checks them once more
//     with the check_* functions (a kernel trusts its arguments; a wrong one would crash the process), fills the struct
//     and calls `run(&Kernels::<kernel>, arguments)`, which releases the GIL. A static Binding registers it:
//         static Binding binding([](py::module_& m) { m.def("<op>_forward", &forward, py::arg("x"), …); });
//  4. fastattn/backends/cpu/<op>.py: allocates the outputs and calls `_native.C.<op>_forward(…)`.
// Outputs are allocated in Python and passed in; a binding returns nothing.
#include "bindings.h"

#include <vector>

namespace fastattn {

namespace {

std::vector<void (*)(py::module_&)>& binding_list() {
    static std::vector<void (*)(py::module_&)> list;
    return list;
}

// What is looked up once: torch's types and the names of attributes. Never freed: the module lives as long as Python.
struct TorchNames {
    PyTypeObject* tensor_type;
    PyObject* get_num_threads;
    struct {
        PyObject* object;
        DType dtype;
    } dtypes[7];
    PyObject *data_ptr, *dtype, *shape, *stride, *is_cpu;
};
TorchNames torch_names;

void load_torch_names() {
    py::module_ torch = py::module_::import("torch");
    auto attribute = [&](const char* name) { return torch.attr(name).cast<py::object>().release().ptr(); };
    torch_names = {
        reinterpret_cast<PyTypeObject*>(attribute("Tensor")),
        attribute("get_num_threads"),
        {{attribute("float32"), DType::kFloat32},
         {attribute("bfloat16"), DType::kBFloat16},
         {attribute("float16"), DType::kFloat16},
         {attribute("float64"), DType::kFloat64},
         {attribute("int32"), DType::kInt32},
         {attribute("int64"), DType::kInt64},
         {attribute("bool"), DType::kBool}},
        PyUnicode_InternFromString("data_ptr"),
        PyUnicode_InternFromString("dtype"),
        PyUnicode_InternFromString("shape"),
        PyUnicode_InternFromString("stride"),
        PyUnicode_InternFromString("is_cpu"),
    };
}

py::object owned(PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

int64_t to_int64(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

}  // namespace

Binding::Binding(void (*define)(py::module_&)) { binding_list().push_back(define); }

Tensor read_tensor(py::handle source) {
    Tensor tensor;
    PyObject* object = source.ptr();
    if (object == Py_None) return tensor;
    const TorchNames& names = torch_names;
    if (!PyObject_TypeCheck(object, names.tensor_type)) {
        type_error(std::string("expected a torch.Tensor or None, got ") + Py_TYPE(object)->tp_name);
    }
    if (owned(PyObject_GetAttr(object, names.is_cpu)).ptr() != Py_True) {
        value_error("expected a tensor in CPU memory, got one on " +
                    py::str(source.attr("device")).cast<std::string>());
    }
    const py::object dtype = owned(PyObject_GetAttr(object, names.dtype));
    for (const auto& known : names.dtypes) {
        if (known.object == dtype.ptr()) tensor.dtype = known.dtype;
    }
    if (!tensor.present()) {
        type_error("the CPU kernels have no tensors of dtype " + py::str(dtype).cast<std::string>());
    }
    const py::object shape = owned(PyObject_GetAttr(object, names.shape));
    const py::object stride = owned(PyObject_CallMethodNoArgs(object, names.stride));
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()) ||
        PyTuple_GET_SIZE(shape.ptr()) != PyTuple_GET_SIZE(stride.ptr())) {
        type_error("expected a tensor with a shape and strides");
    }
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
    if (rank > kMaxRank) value_error("expected a tensor of at most 8 dimensions, got " + std::to_string(rank));
    tensor.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
        tensor.size[i] = to_int64(PyTuple_GET_ITEM(shape.ptr(), i));
        tensor.stride[i] = to_int64(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    const py::object address = owned(PyObject_CallMethodNoArgs(object, names.data_ptr));
    tensor.data = PyLong_AsVoidPtr(address.ptr());
    if (!tensor.data) {
        if (PyErr_Occurred()) throw py::error_already_set();
        if (tensor.numel() > 0) value_error("expected a tensor with memory; this one's storage has been freed");
    }
    return tensor;
}

void adopt_thread_count() {
    static thread_local bool adopted = false;
    if (adopted) return;
    owned(
        PyObject_CallNoArgs(torch_names.get_num_threads));  // torch sets OpenMP's number for this thread, then answers
    adopted = true;
}

// ---- Checks ---------------------------------------------------------------------------------------------------------

void value_error(const std::string& message) { throw py::value_error(message); }
void type_error(const std::string& message) { throw py::type_error(message); }

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kAbsent:
            return "None";
        case DType::kFloat32:
            return "float32";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kFloat16:
            return "float16";
        case DType::kFloat64:
            return "float64";
        case DType::kInt32:
            return "int32";
        case DType::kInt64:
            return "int64";
        case DType::kBool:
            return "bool";
    }
    return "unknown";
}

static std::string sizes_text(const int64_t* sizes, int rank) {
    std::string text = "(";
    for (int i = 0; i < rank; ++i) {
        text += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
    }
    return text + (rank == 1 ? ",)" : ")");
}

std::string shape_text(const Tensor& tensor) {
    if (!tensor.present()) return "None";
    return std::string(dtype_name(tensor.dtype)) + " tensor of shape " + sizes_text(tensor.size, tensor.rank);
}

void check_present(const Tensor& tensor, const char* name) {
    if (!tensor.present()) type_error(std::string(name) + " must be a tensor, got None");
}

void check_dtype(const Tensor& tensor, const char* name, std::initializer_list<DType> allowed) {
    check_present(tensor, name);
    std::string expected;
    for (DType dtype : allowed) {
        if (tensor.dtype == dtype) return;
        expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    }
    type_error(std::string(name) + " must be " + expected + ", got " + dtype_name(tensor.dtype));
}

void check_floating(const Tensor& tensor, const char* name) {
    check_dtype(tensor, name, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
}

void check_rank(const Tensor& tensor, const char* name, int rank) {
    check_present(tensor, name);
    if (tensor.rank != rank) {
        value_error(std::string(name) + " must have " + std::to_string(rank) + " dimensions, got a " +
                    shape_text(tensor));
    }
}

void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_present(tensor, name);
    bool equal = tensor.rank == static_cast<int>(shape.size());
    for (int i = 0; equal && i < tensor.rank; ++i) {
        equal = shape.begin()[i] < 0 || shape.begin()[i] == tensor.size[i];
    }
    if (!equal) {
        value_error(std::string(name) + " must have shape " +
                    sizes_text(shape.begin(), static_cast<int>(shape.size())) + ", got a " + shape_text(tensor));
    }
}

void check_contiguous(const Tensor& tensor, const char* name) {
    if (!tensor.contiguous()) {
        value_error(std::string(name) + " must be contiguous, got strides " + sizes_text(tensor.stride, tensor.rank) +
                    " for a " + shape_text(tensor));
    }
}

void check_writable(const Tensor& tensor, const char* name) {
    for (int i = 0; i < tensor.rank; ++i) {
        if (tensor.size[i] > 1 && tensor.stride[i] == 0) {
            value_error(std::string(name) + " is written to and must not be an expanded tensor");
        }
    }
}

Tensor as_matrix(const Tensor& tensor, const char* name) {
    check_present(tensor, name);
    if (tensor.rank == 0) value_error(std::string(name) + " must have at least one dimension");
    Tensor matrix = tensor;
    matrix.rank = 2;
    matrix.size[0] = 1, matrix.size[1] = tensor.size[tensor.rank - 1];
    matrix.stride[0] = 0, matrix.stride[1] = tensor.stride[tensor.rank - 1];
    for (int i = tensor.rank - 2; i >= 0; --i) {
        if (tensor.size[i] != 1 && matrix.size[0] > 1 && tensor.stride[i] != matrix.size[0] * matrix.stride[0] &&
            tensor.numel() > 0) {
            value_error(std::string(name) + " must be a matrix in memory, got strides " +
                        sizes_text(tensor.stride, tensor.rank) + " for a " + shape_text(tensor));
        }
        if (matrix.size[0] == 1 && tensor.size[i] != 1) matrix.stride[0] = tensor.stride[i];
        matrix.size[0] *= tensor.size[i];
    }
    return matrix;
}

uint64_t read_seed(const Tensor& seed, double dropout_p) {
    if (!(dropout_p >= 0.0 && dropout_p <= 1.0)) {
        value_error("dropout_p must be between 0 and 1, got " + std::to_string(dropout_p));
    }
    if (dropout_p == 0.0) return 0;
    check_dtype(seed, "seed", {DType::kInt64});
    if (seed.numel() != 1) value_error("seed must have one element, got a " + shape_text(seed));
    return static_cast<uint64_t>(*seed.as<int64_t>());
}

}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
    using namespace fastattn;
    m.doc() = "The CPU kernels of fastattn; use them through fastattn.ops.";
    load_torch_names();

    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (int i = 0; const char* name = usable_isa(i); ++i) names.emplace_back(name);
            return names;
        },
        "The instruction sets that were built and that this machine runs, the best first, emulated ones last.");
    m.def("isa", [] { return kernels().isa; }, "The instruction set whose kernels run.");
    m.def(
        "select_isa", [](const std::string& name) { select_isa(name.c_str()); }, py::arg("name"),
        "Uses the kernels of another instruction set, in all threads; ValueError if it is not one of isas().");
    m.def(
        "describe", [](const Tensor& tensor) { return shape_text(tensor); }, py::arg("tensor"),
        "What a kernel is told of this argument.");

    for (auto define : binding_list()) define(m);
}
