// The module fastattn._cuda (or, over the emulation, fastattn._cuda_emulated). Tensors come as addresses: their dtypes,
// shapes, devices and layouts are checked in fastattn/backends/cuda/_native.py, through which every call goes.
#include <pybind11/pybind11.h>

#include "norm.h"

namespace py = pybind11;

namespace fastattn::cuda {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

DType dtype_of(int number) {
    if (number < 0 || number > 2) throw py::value_error("a dtype is 0 (float32), 1 (bfloat16) or 2 (float16)");
    return static_cast<DType>(number);
}

void forward(int dtype, int weight_dtype, int64_t rows, int64_t dim, uintptr_t x, uintptr_t residual, uintptr_t weight,
             uintptr_t bias, uintptr_t out, uintptr_t sum, uintptr_t mean, uintptr_t rstd, uintptr_t seed, float eps,
             double dropout_p, uintptr_t stream) {
    const NormForward arguments{dtype_of(dtype),
                                dtype_of(weight_dtype),
                                rows,
                                dim,
                                at<void>(x),
                                at<void>(residual),
                                at<void>(weight),
                                at<void>(bias),
                                at<void>(out),
                                at<void>(sum),
                                at<float>(mean),
                                at<float>(rstd),
                                at<int64_t>(seed),
                                eps,
                                dropout_p,
                                at<void>(stream)};
    const py::gil_scoped_release release;
    norm_forward(arguments);
}

void backward(int dtype, int weight_dtype, int64_t rows, int64_t dim, uintptr_t grad_out, uintptr_t grad_sum,
              uintptr_t sum, uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t seed, uintptr_t grad_residual,
              uintptr_t grad_x, int64_t programs, uintptr_t partial_weight, uintptr_t partial_bias, double dropout_p,
              uintptr_t stream) {
    const NormBackward arguments{dtype_of(dtype),
                                 dtype_of(weight_dtype),
                                 rows,
                                 dim,
                                 at<void>(grad_out),
                                 at<void>(grad_sum),
                                 at<void>(sum),
                                 at<void>(weight),
                                 at<float>(mean),
                                 at<float>(rstd),
                                 at<int64_t>(seed),
                                 at<void>(grad_residual),
                                 at<void>(grad_x),
                                 programs,
                                 at<float>(partial_weight),
                                 at<float>(partial_bias),
                                 dropout_p,
                                 at<void>(stream)};
    const py::gil_scoped_release release;
    norm_backward(arguments);
}

}  // namespace

PYBIND11_MODULE(FASTATTN_CUDA_MODULE, m) {
    m.def("norm_forward", &forward);
    m.def("norm_backward", &backward);
    m.def("norm_backward_programs", [](int dtype, int64_t rows, int64_t dim, int64_t multiprocessors) {
        return norm_backward_programs(dtype_of(dtype), rows, dim, multiprocessors);
    });
    m.def("norm_most_features", &norm_most_features);
}

}  // namespace fastattn::cuda
