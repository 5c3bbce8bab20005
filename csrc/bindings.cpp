// The module fastattn._C: how tensors come from Python, and the choice of instruction set. Only the files
// csrc/bindings*.cpp know Python, and none knows torch's headers.
//
// To add an op's binding:
//  1. csrc/cpu/kernels.h: the argument struct and the kernel's line in FASTATTN_KERNELS.
//  2. csrc/cpu/<op>.cpp: the kernel. setup.py finds the file and compiles it for every instruction set.
//  3. csrc/bindings_<op>.cpp: a function that takes Tensor (a torch.Tensor or None) and numbers, checks them once more
//     with the check_* functions (a kernel trusts its arguments; a wrong one would crash the process), fills the struct
//     and calls `run(&Kernels::<kernel>, arguments)`, which releases the GIL. A static Binding registers it:
//         Binding <op>_binding([](py::module_& m) { m.def("<op>_forward", &forward, py::arg("x"), …); });
//  4. fastattn/backends/cpu/<op>.py: allocates the outputs and calls `_native.C.<op>_forward(…)`.
// Outputs are allocated in Python and passed in; a binding returns nothing.
#include "bindings.h"

#include <vector>

#include "cpu/process.h"
#include "dlpack.h"

namespace fastattn {

namespace {

std::vector<void (*)(py::module_&)>& binding_list() {
    static std::vector<void (*)(py::module_&)> list;
    return list;
}

// What is looked up once. Never freed: the module lives as long as Python.
struct Torch {
    PyTypeObject* tensor_type;
    PyObject *get_num_threads, *unwrap_if_dead;
    const DLPackExchange* exchange;
};
Torch torch;

void load_torch() {
    py::module_ module = py::module_::import("torch");
    auto attribute = [&](const char* name) { return module.attr(name).cast<py::object>().release().ptr(); };
    torch.tensor_type = reinterpret_cast<PyTypeObject*>(attribute("Tensor"));
    torch.get_num_threads = attribute("get_num_threads");
    torch.unwrap_if_dead = py::object(module.attr("_C").attr("_functorch").attr("unwrap_if_dead")).release().ptr();
    const py::capsule exchange = module.attr("Tensor").attr("__dlpack_c_exchange_api__");
    torch.exchange = exchange.get_pointer<DLPackExchange>();
    if (torch.exchange->major != 1 || !torch.exchange->read) {
        throw py::import_error("fastattn reads tensors through DLPack 1, which this torch does not have");
    }
}

DType dtype_of(const DLPackTensor& source) {
    if (source.lanes != 1) return DType::kAbsent;
    switch (source.code * 256 + source.bits) {
        case kDLFloat * 256 + 32:
            return DType::kFloat32;
        case kDLBfloat * 256 + 16:
            return DType::kBFloat16;
        case kDLFloat * 256 + 16:
            return DType::kFloat16;
        case kDLFloat * 256 + 64:
            return DType::kFloat64;
        case kDLInt * 256 + 32:
            return DType::kInt32;
        case kDLInt * 256 + 64:
            return DType::kInt64;
        case kDLBool * 256 + 8:
            return DType::kBool;
        default:
            return DType::kAbsent;
    }
}

}  // namespace

Binding::Binding(void (*define)(py::module_&)) { binding_list().push_back(define); }

Tensor read_tensor(py::handle object) {
    Tensor tensor;
    if (object.is_none()) return tensor;
    if (!PyObject_TypeCheck(object.ptr(), torch.tensor_type)) {
        type_error(std::string("expected a torch.Tensor or None, got ") + Py_TYPE(object.ptr())->tp_name);
    }
    auto attribute = [&](const char* name) { return py::str(object.attr(name)).cast<std::string>(); };
    DLPackTensor source{};
    if (torch.exchange->read(object.ptr(), &source) != 0) {
        const py::error_already_set error;
        // A tensor that has outlived a torch.func transform stands for the one inside, which it keeps alive.
        const py::object inside = py::handle(torch.unwrap_if_dead)(object);
        if (!inside.is(object)) return read_tensor(inside);
        const auto why = py::str(error.value()).cast<std::string>();
        type_error("the CPU kernels cannot read a tensor of dtype " + attribute("dtype") + " on " +
                   attribute("device") + ": " + why.substr(0, why.find('\n')));  // the rest is a backtrace
    }
    if (source.device_type != kDLCPU && source.device_type != kDLCUDAHost) {
        value_error("expected a tensor in CPU memory, got one on " + attribute("device"));
    }
    tensor.dtype = dtype_of(source);
    if (!tensor.present()) type_error("the CPU kernels have no tensors of dtype " + attribute("dtype"));
    if (source.ndim > kMaxRank) {
        value_error("expected a tensor of at most 8 dimensions, got " + std::to_string(source.ndim));
    }
    tensor.rank = source.ndim;
    for (int i = 0; i < source.ndim; ++i) {
        tensor.size[i] = source.shape[i];
        tensor.stride[i] = source.strides[i];
    }
    tensor.data = source.data ? static_cast<char*>(source.data) + source.byte_offset : nullptr;
    if (!tensor.data && tensor.numel() > 0) {
        value_error("expected a tensor with memory; this one's storage has been freed");
    }
    return tensor;
}

void adopt_thread_count() {
    static thread_local bool adopted = false;
    if (adopted) return;
    py::handle(torch.get_num_threads)();  // torch sets OpenMP's number for this thread, then answers
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
        if (tensor.size[i] > 1 && tensor.stride[i] == 0 && tensor.numel() > 0) {
            value_error(std::string(name) + " is written to and must not be an expanded tensor");
        }
    }
}

void check_output(const Tensor& tensor, const char* name) {
    check_writable(tensor, name);
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int i = 0; i < tensor.rank; ++i) last += (tensor.size[i] - 1) * tensor.stride[i];
    use_huge_pages(tensor.data, static_cast<size_t>((last + 1) * element_size(tensor.dtype)));
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
    load_torch();

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
