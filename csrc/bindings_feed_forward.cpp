// feed_forward_forward, feed_forward_backward, feed_forward_fits.
#include "bindings_linear.h"

namespace fastattn {
namespace {

// What both directions take.
struct Network {
    Tensor x, w1, w2, w_gate;
    int64_t rows, inner, hidden, outer;
};

// All but x, which may be no matrix in memory.
Network read_weights(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w_gate) {
    check_floating(x, "x");
    check(x.rank > 0, "x must have at least one dimension");
    Network net{{}, w1, w2, w_gate, 0, x.size[x.rank - 1], 0, 0};
    check_dtype(w1, "w1", {x.dtype});
    check_shape(w1, "w1", {-1, net.inner});
    net.hidden = w1.size[0];
    check_dtype(w2, "w2", {x.dtype});
    check_shape(w2, "w2", {-1, net.hidden});
    net.outer = w2.size[0];
    if (w_gate.present()) {
        check_dtype(w_gate, "w_gate", {x.dtype});
        check_shape(w_gate, "w_gate", {net.hidden, net.inner});
    }
    return net;
}

Network read_network(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& w_gate) {
    Network net = read_weights(x, w1, w2, w_gate);
    net.x = as_matrix(x, "x");
    net.rows = net.x.size[0];
    return net;
}

// Whether a call's tensors pass the ops layer's checks.
bool feed_forward_fits(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w_gate) {
    return passes([&] {
        const Network net = read_weights(x, w1, w2, w_gate);
        check_size(b1, "b1", x, net.hidden);
        check_size(b2, "b2", x, net.outer);
    });
}

void feed_forward_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w_gate, Tensor seed, Tensor out,
                          Tensor pre, Tensor pre_gate, const std::string& activation, double dropout_p) {
    const Network net = read_network(x, w1, w2, w_gate);
    check_bias(b1, "b1", x, net.hidden);
    check_bias(b2, "b2", x, net.outer);
    if (!w_gate.present() && pre_gate.present()) value_error("pre_gate must be None without w_gate");
    run(&Kernels::feed_forward_forward,
        FeedForwardForward{read_activation(activation), net.x, w1, b1, w2, b2, w_gate,
                           written_rows(out, "out", x, net.rows, net.outer),
                           written_rows_or_absent(pre, "pre", x, net.rows, net.hidden),
                           written_rows_or_absent(pre_gate, "pre_gate", x, net.rows, net.hidden), dropout_p,
                           read_seed(seed, dropout_p)});
}

void feed_forward_backward(Tensor grad_out, Tensor x, Tensor w1, Tensor w2, Tensor w_gate, Tensor pre, Tensor pre_gate,
                           Tensor seed, Tensor grad_x, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2,
                           Tensor grad_w_gate, const std::string& activation, double dropout_p) {
    const Network net = read_network(x, w1, w2, w_gate);
    check_bias(grad_b1, "grad_b1", x, net.hidden);
    check_writable(grad_b1, "grad_b1");
    check_bias(grad_b2, "grad_b2", x, net.outer);
    check_writable(grad_b2, "grad_b2");
    FeedForwardBackward args{};
    args.activation = read_activation(activation);
    args.grad_out = row_matrix_like(grad_out, "grad_out", x, net.rows, net.outer);
    args.x = net.x, args.w1 = w1, args.w2 = w2, args.w_gate = w_gate;
    args.pre = row_matrix_like(pre, "pre", x, net.rows, net.hidden);
    if (w_gate.present()) {
        args.pre_gate = row_matrix_like(pre_gate, "pre_gate", x, net.rows, net.hidden);
        args.grad_w_gate = weight_gradient(grad_w_gate, "grad_w_gate", x, net.hidden, net.inner);
    } else if (grad_w_gate.present()) {
        value_error("grad_w_gate must be None without w_gate");
    }
    args.grad_x = written_rows_or_absent(grad_x, "grad_x", x, net.rows, net.inner);
    args.grad_w1 = weight_gradient(grad_w1, "grad_w1", x, net.hidden, net.inner);
    args.grad_w2 = weight_gradient(grad_w2, "grad_w2", x, net.outer, net.hidden);
    args.grad_b1 = grad_b1, args.grad_b2 = grad_b2;
    args.dropout_p = dropout_p, args.seed = read_seed(seed, dropout_p);
    run(&Kernels::feed_forward_backward, args);
}

Binding feed_forward_binding([](py::module_& m) {
    using py::arg;
    m.def("feed_forward_fits", &feed_forward_fits);
    m.def("feed_forward_forward", &feed_forward_forward, arg("x"), arg("w1"), arg("b1"), arg("w2"), arg("b2"),
          arg("w_gate"), arg("seed"), arg("out"), arg("pre"), arg("pre_gate"), arg("activation"), arg("dropout_p"));
    m.def("feed_forward_backward", &feed_forward_backward, arg("grad_out"), arg("x"), arg("w1"), arg("w2"),
          arg("w_gate"), arg("pre"), arg("pre_gate"), arg("seed"), arg("grad_x"), arg("grad_w1"), arg("grad_b1"),
          arg("grad_w2"), arg("grad_b2"), arg("grad_w_gate"), arg("activation"), arg("dropout_p"));
});

}  // namespace
}  // namespace fastattn
