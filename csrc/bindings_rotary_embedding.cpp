// rotary_embedding, which turns forward and, for the backward, the other way.
#include "bindings_rotary_embedding.h"

namespace fastattn {
namespace {

// (batch, heads, seq, dim) with unit stride along dim.
void check_heads(const Tensor& x, const char* name, DType dtype, const Tensor& like) {
    check_dtype(x, name, {dtype});
    check_shape(x, name, {like.size[0], -1, like.size[2], like.size[3]});
    check(x.unit_last_stride(), "q, k and the outputs must lie along their last dimension in memory");
}

void check_turned(const Tensor& out, const char* name, const Tensor& x) {
    check_heads(out, name, x.dtype, x);
    check_shape(out, name, {x.size[0], x.size[1], x.size[2], x.size[3]});
    check_output(out, name);
}

Tensor read_one(const Tensor& angles, const char* name, const Tensor& x) {
    check_floating(angles, name);
    const int64_t batch = x.size[0], seq = x.size[2];
    const int rank = angles.rank;
    if (rank == 4) {
        check_shape(angles, name, {-1, 1, seq, -1});
    } else if (rank == 3) {
        check_shape(angles, name, {-1, seq, -1});
    } else {
        check_shape(angles, name, {seq, -1});
    }
    const bool one_for_all = rank == 2 || angles.size[0] == 1;
    check(one_for_all || angles.size[0] == batch, "cos and sin must have the batch of what they turn, or 1");
    Tensor result = angles;
    result.rank = 3;
    result.size[0] = batch, result.stride[0] = one_for_all ? 0 : angles.stride[0];
    for (int i = 1; i < 3; ++i) {
        result.size[i] = angles.size[rank - 3 + i], result.stride[i] = angles.stride[rank - 3 + i];
    }
    return result;
}

void rotary_embedding(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor out_q, Tensor out_k, bool interleaved,
                      bool inverse) {
    check_floating(q, "q");
    check_rank(q, "q", 4);
    check_heads(q, "q", q.dtype, q);
    check_heads(k, "k", q.dtype, q);
    check_turned(out_q, "out_q", q);
    check_turned(out_k, "out_k", k);
    const Angles angles = read_angles(cos, sin, q);
    check_unit_last_stride(angles);
    run(&Kernels::rotary_embedding, {q, k, angles.cos, angles.sin, out_q, out_k, interleaved, inverse});
}

Binding rotary_embedding_binding([](py::module_& m) {
    using py::arg;
    m.def("rotary_embedding", &rotary_embedding, arg("q"), arg("k"), arg("cos"), arg("sin"), arg("out_q"), arg("out_k"),
          arg("interleaved"), arg("inverse"));
});

}  // namespace

Angles read_angles(const Tensor& cos, const Tensor& sin, const Tensor& x) {
    const Angles angles{read_one(cos, "cos", x), read_one(sin, "sin", x)};
    bool equal = cos.rank == sin.rank;
    for (int i = 0; equal && i < cos.rank; ++i) equal = cos.size[i] == sin.size[i];
    check(equal, "cos and sin must have the same shape");
    const int64_t rotary_dim = angles.cos.size[2];
    check(rotary_dim % 2 == 0 && rotary_dim <= x.size[3], "rotary_dim must be even and at most head_dim");
    return angles;
}

void check_unit_last_stride(const Angles& angles) {
    check(angles.cos.unit_last_stride() && angles.sin.unit_last_stride(),
          "cos and sin must lie along their last dimension in memory");
}

}  // namespace fastattn
