// encoder_layer_forward, encoder_layer_fits.
#include "bindings_attention.h"
#include "bindings_layer.h"

namespace fastattn {

Tensor checked_weight(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    check_dtype(tensor, name, {x.dtype});
    check_shape(tensor, name, {rows, columns});
    return tensor;
}

Tensor checked_bias(const Tensor& tensor, const char* name, const Tensor& x, int64_t size) {
    check_bias(tensor, name, x, size);
    return tensor;
}

Tensor checked_vector(const Tensor& tensor, const char* name, const Tensor& x, int64_t size) {
    if (!tensor.present()) return tensor;
    check_dtype(tensor, name, {x.dtype, DType::kFloat32});
    check_shape(tensor, name, {size});
    check_contiguous(tensor, name);
    return tensor;
}

Tensor as_rows(const Tensor& tensor, const char* name) {
    check_rank(tensor, name, 3);
    check_contiguous(tensor, name);
    Tensor rows = tensor;
    rows.rank = 2;
    rows.size[0] = tensor.size[0] * tensor.size[1], rows.size[1] = tensor.size[2];
    rows.stride[0] = tensor.size[2], rows.stride[1] = 1;
    return rows;
}

namespace {

struct Weights {
    Tensor w_query, b_query, w_key, b_key, w_value, b_value, w_out, b_out, norm1_weight, norm1_bias;
    Tensor w1, b1, w2, b2, norm2_weight, norm2_bias;
};

// All but out, the activation and the numbers.
void set_layer(EncoderLayer& args, const Tensor& x, const Weights& given, const Tensor& cu_seqlens, int64_t heads,
               int64_t max_seqlen) {
    check_floating(x, "x");
    args.x = as_rows(x, "x");
    args.batch = x.size[0], args.seq = x.size[1], args.heads = heads;
    if (cu_seqlens.present()) {
        check(x.size[0] == 1, "x must have a batch of 1 with cu_seqlens: the sequences lie end to end");
        check_rank(cu_seqlens, "cu_seqlens", 1);
        check(cu_seqlens.size[0] > 0, "cu_seqlens must have at least one element, 0");
        args.batch = cu_seqlens.size[0] - 1;
        args.seq = check_cu_seqlens(cu_seqlens, "cu_seqlens", args.batch, args.x.size[0], max_seqlen);
        args.cu_seqlens = cu_seqlens;
    }
    const int64_t width = x.size[2];
    check_rank(given.w_query, "w_query", 2);
    const int64_t inner = given.w_query.size[0];
    check(heads > 0 && inner > 0 && inner % heads == 0, "w_query must have a multiple of heads rows");
    args.w_query = checked_weight(given.w_query, "w_query", x, inner, width);
    args.b_query = checked_bias(given.b_query, "b_query", x, inner);
    args.w_key = checked_weight(given.w_key, "w_key", x, inner, width);
    args.b_key = checked_bias(given.b_key, "b_key", x, inner);
    args.w_value = checked_weight(given.w_value, "w_value", x, inner, width);
    args.b_value = checked_bias(given.b_value, "b_value", x, inner);
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
    args.norm2_weight = checked_vector(given.norm2_weight, "norm2_weight", x, width);
    args.norm2_bias = checked_vector(given.norm2_bias, "norm2_bias", x, width);
}

void encoder_layer_forward(Tensor x, Tensor w_query, Tensor b_query, Tensor w_key, Tensor b_key, Tensor w_value,
                           Tensor b_value, Tensor w_out, Tensor b_out, Tensor norm1_weight, Tensor norm1_bias,
                           Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor norm2_weight, Tensor norm2_bias,
                           Tensor cu_seqlens, Tensor out, int64_t heads, int64_t max_seqlen,
                           const std::string& activation, double eps1, double eps2, double scale, bool norm_first) {
    EncoderLayer args = {};
    set_layer(args, x,
              {w_query, b_query, w_key, b_key, w_value, b_value, w_out, b_out, norm1_weight, norm1_bias, w1, b1, w2, b2,
               norm2_weight, norm2_bias},
              cu_seqlens, heads, max_seqlen);
    check_output(out, "out", x.dtype, {x.size[0], x.size[1], x.size[2]});
    args.out = as_rows(out, "out");
    args.activation = read_activation(activation);
    args.scale = static_cast<float>(scale);
    args.eps1 = static_cast<float>(eps1), args.eps2 = static_cast<float>(eps2);
    args.norm_first = norm_first;
    run(&Kernels::encoder_layer, args);
}

// Whether a call's tensors pass these checks, asked before it is made.
bool encoder_layer_fits(Tensor x, Tensor w_query, Tensor b_query, Tensor w_key, Tensor b_key, Tensor w_value,
                        Tensor b_value, Tensor w_out, Tensor b_out, Tensor norm1_weight, Tensor norm1_bias, Tensor w1,
                        Tensor b1, Tensor w2, Tensor b2, Tensor norm2_weight, Tensor norm2_bias, Tensor cu_seqlens,
                        int64_t heads, int64_t max_seqlen) {
    EncoderLayer args = {};
    const Weights weights = {w_query,      b_query,    w_key, b_key, w_value, b_value, w_out,        b_out,
                             norm1_weight, norm1_bias, w1,    b1,    w2,      b2,      norm2_weight, norm2_bias};
    return passes([&] { set_layer(args, x, weights, cu_seqlens, heads, max_seqlen); });
}

Binding encoder_layer_binding([](py::module_& m) {
    using py::arg;
    m.def("encoder_layer_forward", &encoder_layer_forward, arg("x"), arg("w_query"), arg("b_query"), arg("w_key"),
          arg("b_key"), arg("w_value"), arg("b_value"), arg("w_out"), arg("b_out"), arg("norm1_weight"),
          arg("norm1_bias"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("norm2_weight"), arg("norm2_bias"),
          arg("cu_seqlens"), arg("out"), arg("heads"), arg("max_seqlen"), arg("activation"), arg("eps1"), arg("eps2"),
          arg("scale"), arg("norm_first"));
    m.def("encoder_layer_fits", &encoder_layer_fits);
});

}  // namespace
}  // namespace fastattn
