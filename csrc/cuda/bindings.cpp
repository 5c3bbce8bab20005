// The module fastattn._cuda (or, over the emulation, fastattn._cuda_emulated). Tensors come as addresses: their dtypes,
// shapes, devices and layouts are checked in fastattn/backends/cuda/_native.py, through which every call goes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"
#include "decode.h"
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

using Strides = std::array<int64_t, 3>;  // of all dimensions but the last, which is contiguous

// Queries, keys and values come as addresses with sizes (heads, tokens) and strides.
void attention_forward(int dtype, int64_t batch, int64_t dim, uintptr_t query, const std::array<int64_t, 2>& queries,
                       const Strides& query_strides, uintptr_t key, uintptr_t value, const std::array<int64_t, 2>& keys,
                       const Strides& key_strides, const Strides& value_strides, float scale, int64_t window_left,
                       int64_t window_right, int64_t diagonal, int64_t section_bytes, uintptr_t out, uintptr_t lse,
                       uintptr_t stream) {
    auto operand = [](uintptr_t address, const std::array<int64_t, 2>& sizes, const Strides& s) {
        return AttentionOperand{at<void>(address), sizes[0], sizes[1], s[0], s[1], s[2]};
    };
    const AttentionForward arguments{dtype_of(dtype),
                                     batch,
                                     dim,
                                     operand(query, queries, query_strides),
                                     operand(key, keys, key_strides),
                                     operand(value, keys, value_strides),
                                     scale,
                                     window_left,
                                     window_right,
                                     diagonal,
                                     section_bytes,
                                     at<void>(out),
                                     at<float>(lse),
                                     at<void>(stream)};
    const py::gil_scoped_release release;
    attention_forward_hopper(arguments);
}

void attend_to_cache(int dtype, const std::array<int64_t, 5>& sizes, const std::array<int64_t, 3>& cache,
                     const std::array<int64_t, 2>& dims, uintptr_t query, const Strides& query_strides,
                     uintptr_t k_cache, const Strides& k_cache_strides, uintptr_t v_cache,
                     const Strides& v_cache_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
                     const Strides& v_strides, uintptr_t cos, int cos_dtype, const std::array<int64_t, 2>& cos_strides,
                     uintptr_t sin, int sin_dtype, const std::array<int64_t, 2>& sin_strides, int64_t rotary_dim,
                     bool interleaved, uintptr_t cache_seqlens, uintptr_t block_table, int64_t table_stride,
                     uintptr_t slopes, int64_t slopes_stride, float scale, float softcap, int64_t window_left,
                     int64_t window_right, uintptr_t out, uintptr_t lse, int64_t parts, uintptr_t partial_out,
                     uintptr_t partial_lse, uintptr_t stream) {
    auto rows = [](uintptr_t address, const Strides& s, uintptr_t added, const Strides& t, int64_t dim) {
        return CacheAddress{at<void>(address), s[0], s[1], s[2], at<void>(added), t[0], t[1], t[2], dim};
    };
    auto angles = [](uintptr_t address, int dtype, const std::array<int64_t, 2>& s) {
        return AngleAddress{at<void>(address), dtype_of(dtype), s[0], s[1]};
    };
    const Turn turn{angles(cos, cos_dtype, cos_strides), angles(sin, sin_dtype, sin_strides), rotary_dim, interleaved};
    const auto [batch, heads, kv_heads, queries, added] = sizes;
    const auto [capacity, pages, page_size] = cache;
    const Decode arguments{dtype_of(dtype),
                           batch,
                           heads,
                           kv_heads,
                           queries,
                           added,
                           capacity,
                           pages,
                           page_size,
                           at<void>(query),
                           query_strides[0],
                           query_strides[1],
                           query_strides[2],
                           rows(k_cache, k_cache_strides, k, k_strides, dims[0]),
                           rows(v_cache, v_cache_strides, v, v_strides, dims[1]),
                           turn,
                           at<int32_t>(cache_seqlens),
                           at<int32_t>(block_table),
                           table_stride,
                           at<float>(slopes),
                           slopes_stride,
                           scale,
                           softcap,
                           window_left,
                           window_right,
                           at<void>(out),
                           at<float>(lse),
                           parts,
                           at<float>(partial_out),
                           at<float>(partial_lse),
                           at<void>(stream)};
    const py::gil_scoped_release release;
    decode(arguments);
}

}  // namespace

PYBIND11_MODULE(FASTATTN_CUDA_MODULE, m) {
    m.def("norm_forward", &forward);
    m.def("norm_backward", &backward);
    m.def("norm_backward_programs", [](int dtype, int64_t rows, int64_t dim, int64_t multiprocessors) {
        return norm_backward_programs(dtype_of(dtype), rows, dim, multiprocessors);
    });
    m.def("norm_most_features", &norm_most_features);
    m.def("attention_forward", &attention_forward);
    m.def("attend_to_cache", &attend_to_cache);
    m.def("decode_parts", &decode_parts);
    m.def("decode_most_rows", &decode_most_rows);
    m.def("decode_most_dim", &decode_most_dim);
}

}  // namespace fastattn::cuda
