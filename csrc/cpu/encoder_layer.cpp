// A layer of a Transformer's encoder (Vaswani et al., 2017), forward, without dropout: the kernels of its parts, one after
// the other, with nothing of Python or torch between them.
//
//     after the sublayers (BERT):    h = norm1(x + attention(x));            out = norm2(h + w2 activation(w1 h))
//     before them (norm_first):      h = x + attention(norm1(x));            out = h + w2 activation(w1 norm2(h))
//     attention(x) = w_out softmax(scale * (w_query x) . (w_key x)^T) (w_value x), head by head
//
// Tile: a chunk of whole sequences of about kChunkRows rows goes through all of the layer, so that what one part writes the
// next one reads from a cache; up to 256 rows read each weight as it lies (product.h). Both additions are in the
// epilogues of the products before them, unrounded.
//
// Work: 2 rows (4 width^2 + 2 width hidden) flops and attention's. Must move x, out and the weights once.
#include "layer.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;

// Rows of a contiguous matrix, as one.
Tensor rows_from(const Tensor& matrix, int64_t first, int64_t count) {
    Tensor rows = matrix;
    rows.data = matrix.as<char>() + first * matrix.stride[0] * element_size(matrix.dtype);
    rows.size[0] = count;
    return rows;
}

class Layer {
  public:
    explicit Layer(const EncoderLayer& args)
        : args_(args),
          width_(args.x.size[1]),
          inner_(args.w_query.size[0]),
          hidden_(args.w1.size[0]),
          rows_at_once_(find_rows_at_once()),
          // normed or attended + hidden states; queries, keys, values, attention's output; hidden; h
          space_(ScratchMatrices::size(args.x.dtype, rows_at_once_, 2 * width_ + 4 * inner_ + hidden_, 7)),
          statistics_(rows_at_once_ * (2 + args.heads)) {}

    void run() const {
        for (int64_t first = 0; first < args_.batch;) {
            int64_t count = 1;
            while (first + count < args_.batch && rows_of(first, count + 1) <= rows_at_once_) ++count;
            run_sequences(first, count);
            first += count;
        }
    }

  private:
    int64_t begin_of(int64_t b) const {
        return args_.cu_seqlens.present() ? args_.cu_seqlens.as<const int32_t>()[b] : b * args_.seq;
    }
    int64_t rows_of(int64_t b, int64_t count) const { return begin_of(b + count) - begin_of(b); }

    int64_t find_rows_at_once() const {
        int64_t most = kChunkRows;
        for (int64_t b = 0; b < args_.batch; ++b) most = larger(most, rows_of(b, 1));
        return smaller(most, begin_of(args_.batch));
    }

    // Sequences b … b + count - 1.
    void run_sequences(int64_t b, int64_t count) const {
        const int64_t rows = rows_of(b, count);
        if (rows == 0) return;
        ScratchMatrices scratch(space_.get(), args_.x.dtype, rows);
        const Tensor x = rows_from(args_.x, begin_of(b), rows), out = rows_from(args_.out, begin_of(b), rows);
        const Tensor query = scratch.take(inner_), key = scratch.take(inner_), value = scratch.take(inner_);
        const Tensor attended = scratch.take(inner_), hidden = scratch.take(hidden_);
        const Tensor one = scratch.take(width_), two = scratch.take(width_);

        if (args_.norm_first) norm(x, args_.norm1_weight, args_.norm1_bias, args_.eps1, one);
        const Tensor& read = args_.norm_first ? one : x;
        layer_linear(read, args_.w_query, args_.b_query, Activation::kNone, {}, query);
        layer_linear(read, args_.w_key, args_.b_key, Activation::kNone, {}, key);
        layer_linear(read, args_.w_value, args_.b_value, Activation::kNone, {}, value);
        attend(b, count, query, key, value, attended);
        if (args_.norm_first) {
            layer_linear(attended, args_.w_out, args_.b_out, Activation::kNone, x, two);
            norm(two, args_.norm2_weight, args_.norm2_bias, args_.eps2, one);
            layer_linear(one, args_.w1, args_.b1, args_.activation, {}, hidden);
            layer_linear(hidden, args_.w2, args_.b2, Activation::kNone, two, out);
        } else {
            layer_linear(attended, args_.w_out, args_.b_out, Activation::kNone, x, one);
            norm(one, args_.norm1_weight, args_.norm1_bias, args_.eps1, two);
            layer_linear(two, args_.w1, args_.b1, args_.activation, {}, hidden);
            layer_linear(hidden, args_.w2, args_.b2, Activation::kNone, two, one);
            norm(one, args_.norm2_weight, args_.norm2_bias, args_.eps2, out);
        }
    }

    void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& out) const {
        layer_norm(Norm::kLayer, x, weight, bias, eps, statistics_.get(), out);
    }

    void attend(int64_t b, int64_t count, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& attended) const {
        const bool packed = args_.cu_seqlens.present();
        const int64_t rows = query.size[0], head_dim = inner_ / args_.heads, length = packed ? rows : args_.seq;
        auto heads_apart = [&](const Tensor& matrix) {  // (batch, heads, token, head_dim); packed: batch stride 0
            Tensor t = matrix;
            t.rank = 4;
            t.size[0] = count, t.size[1] = args_.heads, t.size[2] = length, t.size[3] = head_dim;
            t.stride[0] = packed ? 0 : length * inner_, t.stride[1] = head_dim, t.stride[2] = inner_, t.stride[3] = 1;
            return t;
        };
        AttentionForward args = {};
        args.batch = count, args.heads = args.kv_heads = args_.heads;
        args.max_q = args.max_k = args_.seq;
        args.window_left = args.window_right = -1;
        args.scale = args_.scale;
        args.query = heads_apart(query), args.key = heads_apart(key), args.value = heads_apart(value);
        args.out = heads_apart(attended);
        Tensor lse = float_vector(statistics_.get() + 2 * rows_at_once_, args_.heads * rows);
        lse.rank = 3;
        lse.size[0] = count, lse.size[1] = args_.heads, lse.size[2] = length;
        lse.stride[0] = packed ? 0 : args_.heads * length, lse.stride[1] = length, lse.stride[2] = 1;
        args.lse = lse;
        if (!packed) return attention_forward(args);
        // The kernel's sequences begin at the chunk's first row.
        const Scratch<int32_t> ends(count + 1);
        for (int64_t i = 0; i <= count; ++i) ends.get()[i] = static_cast<int32_t>(begin_of(b + i) - begin_of(b));
        args.cu_seqlens_q = args_.cu_seqlens;
        args.cu_seqlens_q.data = ends.get();
        args.cu_seqlens_q.size[0] = count + 1;
        args.cu_seqlens_k = args.cu_seqlens_q;
        attention_forward(args);
    }

    const EncoderLayer& args_;
    const int64_t width_, inner_, hidden_, rows_at_once_;
    const Scratch<char> space_;
    const Scratch<float> statistics_;
};

}  // namespace

void encoder_layer(const EncoderLayer& args) { Layer(args).run(); }

}  // namespace fastattn::FASTATTN_ISA
