// A layer of a decoder on new tokens (Radford et al., 2019; Touvron et al., 2023), forward, without dropout: the kernels of its
// parts, one after the other, with nothing of Python or torch between them.
//
//     h = x + w_out attention(norm1(x)),      out = h + feed_forward(norm2(h))
//     attention(x) = softmax(scale * query . keys^T) . values, head by head, with query, key, value = w_qkv x, query and key
//                    turned by their positions' angles; key and value are written behind those of the cache
//
// Tile: none of its own; a call has few rows, whose matrices stay in the first two caches. Both additions are in the epilogues of
// the products before them, unrounded.
//
// Must read: all weights and the cache's keys and values once, which for a token or a few is the time it takes. Python takes as
// long between two layers' kernels as a small layer's weights, since they have pushed it out of the caches: hence one call.
#include "layer.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// `heads` heads from column `first` on of (batch * seq, columns), as (batch, heads, seq, head_dim).
Tensor heads_of(const Tensor& matrix, const DecoderLayer& args, int64_t first, int64_t heads, int64_t head_dim) {
    Tensor apart = matrix;
    apart.data = matrix.as<char>() + first * element_size(matrix.dtype);
    apart.rank = 4;
    apart.size[0] = args.batch, apart.size[1] = heads, apart.size[2] = args.seq, apart.size[3] = head_dim;
    apart.stride[0] = args.seq * matrix.stride[0], apart.stride[1] = head_dim;
    apart.stride[2] = matrix.stride[0], apart.stride[3] = 1;
    return apart;
}

void attend(const DecoderLayer& args, const Tensor& qkv, float* lse, const Tensor& attended) {
    const int64_t heads = args.heads, kv_heads = args.k_cache.size[1], head_dim = args.k_cache.size[3];
    const Tensor query = heads_of(qkv, args, 0, heads, head_dim);
    const Tensor key = heads_of(qkv, args, heads * head_dim, kv_heads, head_dim);
    AttentionForward call = {};
    call.batch = args.batch, call.heads = heads, call.kv_heads = kv_heads;
    call.max_q = call.new_keys = args.seq, call.max_k = args.longest;
    call.cache_seqlens = args.cache_seqlens;
    call.window_left = -1, call.window_right = 0;
    call.scale = args.scale;
    call.query = query, call.key = args.k_cache, call.value = args.v_cache;
    call.new_key = key, call.new_value = heads_of(qkv, args, (heads + kv_heads) * head_dim, kv_heads, head_dim);
    call.cos = args.cos, call.sin = args.sin;
    call.out = heads_of(attended, args, 0, heads, head_dim);
    call.lse = float_vector(lse, args.batch * heads * args.seq);
    call.lse.rank = 3;
    call.lse.size[0] = args.batch, call.lse.size[1] = heads, call.lse.size[2] = args.seq;
    call.lse.stride[0] = heads * args.seq, call.lse.stride[1] = args.seq, call.lse.stride[2] = 1;
    attention_forward(call);
}

}  // namespace

void decoder_layer(const DecoderLayer& args) {
    const int64_t rows = args.x.size[0], width = args.x.size[1], columns = args.w_qkv.size[0];
    const int64_t inner = args.heads * args.k_cache.size[3];
    if (rows == 0) return;
    const DType dtype = args.x.dtype;
    const Scratch<char> space(ScratchMatrices::size(dtype, rows, 2 * width + columns + inner, 4));
    const Scratch<float> statistics(rows * (2 + args.heads));
    ScratchMatrices scratch(space.get(), dtype, rows);
    const Tensor normed = scratch.take(width), h = scratch.take(width);
    const Tensor qkv = scratch.take(columns), attended = scratch.take(inner);

    layer_norm(args.norm, args.x, args.norm1_weight, args.norm1_bias, args.eps1, statistics.get(), normed);
    layer_linear(normed, args.w_qkv, args.b_qkv, Activation::kNone, {}, qkv);
    attend(args, qkv, statistics.get() + 2 * rows, attended);
    layer_linear(attended, args.w_out, args.b_out, Activation::kNone, args.x, h);
    layer_norm(args.norm, h, args.norm2_weight, args.norm2_bias, args.eps2, statistics.get(), normed);
    feed_forward_forward(
        {args.activation, normed, args.w1, args.b1, args.w2, args.b2, args.w_gate, args.out, {}, {}, 0.0, 0, h});
}

}  // namespace fastattn::FASTATTN_ISA
