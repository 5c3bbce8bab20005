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

// (seq, rotary_dim) or (batch or 1, 1, seq, rotary_dim) as (batch, seq, rotary_dim).
Tensor read_angle(const Tensor& angles, const char* name, int64_t batch, int64_t seq) {
    check_floating(angles, name);
    Tensor result = angles;
    result.rank = 3;
    if (angles.rank == 2) {
        check_shape(angles, name, {seq, -1});
        result.stride[0] = 0;
        result.size[1] = angles.size[0], result.stride[1] = angles.stride[0];
        result.size[2] = angles.size[1], result.stride[2] = angles.stride[1];
    } else {
        check_shape(angles, name, {-1, 1, seq, -1});
        check(angles.size[0] == 1 || angles.size[0] == batch, "cos and sin must have q's batch, or 1");
        result.stride[0] = angles.size[0] == 1 ? 0 : angles.stride[0];
        result.size[1] = angles.size[2], result.stride[1] = angles.stride[2];
        result.size[2] = angles.size[3], result.stride[2] = angles.stride[3];
    }
    result.size[0] = batch;
    check(result.unit_last_stride(), "cos and sin must lie along their last dimension in memory");
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
    read_angles(cos, sin, q.size[0], q.size[2], q.size[3]);
    run(&Kernels::rotary_embedding, RotaryEmbedding{q, k, cos, sin, out_q, out_k, interleaved, inverse});
}

Binding rotary_embedding_binding([](py::module_& m) {
    using py::arg;
    m.def("rotary_embedding", &rotary_embedding, arg("q"), arg("k"), arg("cos"), arg("sin"), arg("out_q"), arg("out_k"),
          arg("interleaved"), arg("inverse"));
});

}  // namespace

void read_angles(Tensor& cos, Tensor& sin, int64_t batch, int64_t seq, int64_t head_dim) {
    check(cos.rank == sin.rank, "cos and sin must have the same shape");
    for (int i = 0; i < cos.rank; ++i) check(cos.size[i] == sin.size[i], "cos and sin must have the same shape");
    cos = read_angle(cos, "cos", batch, seq), sin = read_angle(sin, "sin", batch, seq);
    const int64_t rotary_dim = cos.size[2];
    check(rotary_dim % 2 == 0 && rotary_dim <= head_dim, "rotary_dim must be even and at most head_dim");
}

}  // namespace fastattn
