// How a binding gets its tensors from Python, checks them and runs a kernel. See bindings.cpp for the recipe.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>

#include "cpu/kernels.h"

namespace fastattn {

namespace py = pybind11;

// A static Binding makes its function define Python functions when the module is imported.
struct Binding {
    explicit Binding(void (*define)(py::module_&));
};

// ---- Checks: each throws ValueError (wrong value or size) or TypeError (wrong dtype) with a sentence ----------------

const char* dtype_name(DType dtype);
std::string shape_text(const Tensor& tensor);  // "float32 tensor of shape (2, 3)"

[[noreturn]] void value_error(const std::string& message);
[[noreturn]] void type_error(const std::string& message);

// Raises ValueError(message) unless the condition holds.
inline void check(bool condition, const char* message) {
    if (!condition) value_error(message);
}

void check_present(const Tensor& tensor, const char* name);
void check_dtype(const Tensor& tensor, const char* name, std::initializer_list<DType> allowed);
// float32, bfloat16 or float16: what the kernels compute on.
void check_floating(const Tensor& tensor, const char* name);
void check_rank(const Tensor& tensor, const char* name, int rank);
// Rank and every size; -1 stands for any size.
void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape);
void check_contiguous(const Tensor& tensor, const char* name);
// A tensor that is written to must not have elements on top of each other (an expanded tensor).
void check_writable(const Tensor& tensor, const char* name);
// The same of a tensor that is about to be filled, mostly fresh memory: a large one gets huge pages. Nothing for an absent
// one.
void check_output(const Tensor& tensor, const char* name);
// A tensor (…, features) as the matrix (rows, features) that it is. Refused if its leading dimensions are no single one in
// memory.
Tensor as_matrix(const Tensor& tensor, const char* name);
// The seed of a dropout: an int64 tensor with one element, or absent where dropout_p is 0. Checks dropout_p, too.
uint64_t read_seed(const Tensor& seed, double dropout_p);

// Whether a check finds nothing wrong.
template <class Check>
bool passes(const Check& check) {
    try {
        check();
        return true;
    } catch (const py::builtin_exception&) {
        return false;
    }
}

// ---- Running --------------------------------------------------------------------------------------------------------

// Called with the GIL held, before each kernel: gives this thread torch's number of threads. Threads other than the one
// that called torch.set_num_threads have OpenMP's default until torch is asked.
void adopt_thread_count();

// Runs a kernel of the instruction set in use, without the GIL: run(&Kernels::name, arguments).
template <class Arguments>
void run(void (*Kernels::*kernel)(const Arguments&), const Arguments& arguments) {
    adopt_thread_count();
    const auto function = kernels().*kernel;
    py::gil_scoped_release release;
    function(arguments);
}

// What the caster reads of a Python object; raises TypeError or ValueError if it is no tensor that kernels can use.
Tensor read_tensor(py::handle object);

}  // namespace fastattn

namespace pybind11::detail {

// A binding's parameter of type Tensor takes a torch.Tensor in CPU memory, or None.
template <>
struct type_caster<fastattn::Tensor> {
    PYBIND11_TYPE_CASTER(fastattn::Tensor, const_name("torch.Tensor | None"));
    bool load(handle source, bool) {
        value = fastattn::read_tensor(source);
        return true;
    }
};

}  // namespace pybind11::detail
