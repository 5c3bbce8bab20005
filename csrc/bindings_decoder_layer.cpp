// decoder_layer_forward, decoder_layer_fits.
#include "bindings_attention.h"
#include "bindings_layer.h"
#include "bindings_rotary_embedding.h"

namespace fastattn {
namespace {

struct DecoderWeights {
    Tensor w_qkv, b_qkv, w_out, b_out, norm1_weight, norm1_bias;
    Tensor w1, b1, w2, b2, w_gate, norm2_weight, norm2_bias;
};

// All but out, the activation, the norm and the numbers.
void set_decoder_layer(DecoderLayer& args, const Tensor& x, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& cache_seqlens, const DecoderWeights& given, const Tensor& cos, const Tensor& sin) {
    check_floating(x, "x");
    args.x = as_rows(x, "x");
    args.batch = x.size[0], args.seq = x.size[1];
    const int64_t width = x.size[2];

    check_dtype(k_cache, "k_cache", {x.dtype});
    check_dtype(v_cache, "v_cache", {x.dtype});
    check_shape(k_cache, "k_cache", {args.batch, -1, -1, -1});
    const int64_t kv_heads = k_cache.size[1], capacity = k_cache.size[2], head_dim = k_cache.size[3];
    check(kv_heads > 0 && head_dim > 0, "k_cache must have at least one head and one element in each");
    check_shape(v_cache, "v_cache", {args.batch, kv_heads, capacity, head_dim});
    check_writable(k_cache, "k_cache");
    check_writable(v_cache, "v_cache");
    args.k_cache = k_cache, args.v_cache = v_cache, args.cache_seqlens = cache_seqlens;
    args.longest = check_cache_seqlens(cache_seqlens, args.batch, args.seq, capacity);
    if (cos.present() || sin.present()) {
        Tensor tokens = k_cache;  // the new ones
        tokens.size[2] = args.seq;
        const Angles angles = read_angles(cos, sin, tokens);
        args.cos = angles.cos, args.sin = angles.sin;
    }

    check_rank(given.w_out, "w_out", 2);
    const int64_t inner = given.w_out.size[1];
    check(inner > 0 && inner % (kv_heads * head_dim) == 0,
          "w_out must have heads of the cache's size, a multiple of its");
    args.heads = inner / head_dim;
    const int64_t columns = inner + 2 * kv_heads * head_dim;
    args.w_qkv = checked_weight(given.w_qkv, "w_qkv", x, columns, width);
    args.b_qkv = checked_bias(given.b_qkv, "b_qkv", x, columns);
    args.w_out = checked_weight(given.w_out, "w_out", x, width, inner);
    args.b_out = checked_bias(given.b_out, "b_out", x, width);
    args.norm1_weight = checked_vector(given.norm1_weight, "norm1_weight", x, width);
    args.norm1_bias = checked_vector(given.norm1_bias, "norm1_bias", x, width);
    check_rank(given.w1, "w1", 2);
    const int64_t hidden = given.w1.size[0];
    args.w1 = checked_weight(given.w1, "w1", x, hidden, width);
    args.b1 = checked_bias(given.b1, "b1", x, hidden);
    args.w2 = checked_weight(given.w2, "w2", x, width, hidden);
    args.b2 = checked_bias(given.b2, "b2", x, width);
    if (given.w_gate.present()) args.w_gate = checked_weight(given.w_gate, "w_gate", x, hidden, width);
    args.norm2_weight = checked_vector(given.norm2_weight, "norm2_weight", x, width);
    args.norm2_bias = checked_vector(given.norm2_bias, "norm2_bias", x, width);
}

Norm decoder_norm(const std::string& name, const DecoderLayer& args) {
    if (name == "layer") return Norm::kLayer;
    if (name != "rms") value_error("norm is '" + name + "'; expected 'layer' or 'rms'");
    check(!args.norm1_bias.present() && !args.norm2_bias.present(), "RMS norm has no bias");
    return Norm::kRms;
}

void decoder_layer_forward(Tensor x, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor w_qkv, Tensor b_qkv,
                           Tensor w_out, Tensor b_out, Tensor norm1_weight, Tensor norm1_bias, Tensor w1, Tensor b1,
                           Tensor w2, Tensor b2, Tensor w_gate, Tensor norm2_weight, Tensor norm2_bias, Tensor cos,
                           Tensor sin, Tensor out, const std::string& activation, const std::string& norm, double eps1,
                           double eps2, double scale) {
    DecoderLayer args = {};
    set_decoder_layer(
        args, x, k_cache, v_cache, cache_seqlens,
        {w_qkv, b_qkv, w_out, b_out, norm1_weight, norm1_bias, w1, b1, w2, b2, w_gate, norm2_weight, norm2_bias}, cos,
        sin);
    if (args.cos.present()) check_unit_last_stride({args.cos, args.sin});
    check_output(out, "out", x.dtype, {x.size[0], x.size[1], x.size[2]});
    args.out = as_rows(out, "out");
    args.activation = read_activation(activation);
    args.norm = decoder_norm(norm, args);
    args.scale = static_cast<float>(scale);
    args.eps1 = static_cast<float>(eps1), args.eps2 = static_cast<float>(eps2);
    run(&Kernels::decoder_layer, args);
}

// Whether a call's tensors pass these checks, asked before it is made.
bool decoder_layer_fits(Tensor x, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor w_qkv, Tensor b_qkv,
                        Tensor w_out, Tensor b_out, Tensor norm1_weight, Tensor norm1_bias, Tensor w1, Tensor b1,
                        Tensor w2, Tensor b2, Tensor w_gate, Tensor norm2_weight, Tensor norm2_bias, Tensor cos,
                        Tensor sin) {
    DecoderLayer args = {};
    const DecoderWeights weights = {w_qkv, b_qkv, w_out, b_out,  norm1_weight, norm1_bias, w1,
                                    b1,    w2,    b2,    w_gate, norm2_weight, norm2_bias};
    return passes([&] { set_decoder_layer(args, x, k_cache, v_cache, cache_seqlens, weights, cos, sin); });
}

Binding decoder_layer_binding([](py::module_& m) {
    using py::arg;
    m.def("decoder_layer_forward", &decoder_layer_forward, arg("x"), arg("k_cache"), arg("v_cache"),
          arg("cache_seqlens"), arg("w_qkv"), arg("b_qkv"), arg("w_out"), arg("b_out"), arg("norm1_weight"),
          arg("norm1_bias"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("w_gate"), arg("norm2_weight"),
          arg("norm2_bias"), arg("cos"), arg("sin"), arg("out"), arg("activation"), arg("norm"), arg("eps1"),
          arg("eps2"), arg("scale"));
    m.def("decoder_layer_fits", &decoder_layer_fits);
});

}  // namespace
}  // namespace fastattn
