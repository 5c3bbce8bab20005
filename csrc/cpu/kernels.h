// The kernels that every instruction set provides, and their arguments.
//
// To add a kernel: write its argument struct here, add a line to FASTATTN_KERNELS, and define, in a file of csrc/cpu,
//     namespace fastattn::FASTATTN_ISA { void name(const Arguments& args) { … } }
// The list declares the function, puts it in each instruction set's table and checks its type. A binding calls it
// through `kernels().name` (bindings.h).
//
// Kernels trust their arguments: the binding has checked dtypes, ranks and sizes. They throw nothing but
// std::bad_alloc, and that only outside of parallel regions.
#pragma once

#include "tensor.h"

namespace fastattn {

// ---- Layer norm and RMS norm ----------------------------------------------------------------------------------------

enum class Norm : int32_t { kLayer, kRms };

// sum = residual + dropout(x); out = norm(sum) * weight + bias. All but weight and bias are contiguous (rows, dim)
// matrices of one dtype; weight and bias are (dim,) in that dtype or float32; mean and rstd are (rows,) float32.
struct NormForward {
    Norm norm;
    int64_t rows, dim;
    Tensor x, weight, bias, residual;  // all but x may be absent
    Tensor out, sum, mean, rstd;       // sum absent where it equals x; mean absent for RMS norm
    float eps;
    double dropout_p;  // 0: no dropout, seed unused
    uint64_t seed;
};

// grad_residual = d sum; grad_x = dropout mask * d sum, absent without dropout. grad_out, grad_sum and sum as above.
struct NormBackward {
    Norm norm;
    int64_t rows, dim;
    Tensor grad_out, grad_sum, sum, weight, mean, rstd;    // grad_sum, weight and mean may be absent
    Tensor grad_residual, grad_x, grad_weight, grad_bias;  // all but grad_residual may be absent
    double dropout_p;
    uint64_t seed;
};

// ---- Attention, forward ---------------------------------------------------------------------------------------------

// What decides, beside query and key, how a query scores a key (docs/architecture.md, "Attention"), in three forms:
//     dense    neither cu_seqlens nor cache_seqlens; q_len = max_q, k_len = max_k, the diagonal as given
//     packed   sequence b has queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1, and likewise keys
//     cache    sequence b has max_q queries and cache_seqlens[b] + new_keys keys
// max_q and max_k bound the lengths of all sequences. Tensors of queries and keys are (batch, heads, token, dim) of any
// strides; packed ones have batch stride 0, and their token counts along the packed tensor.
struct AttentionScore {
    int64_t batch, heads, kv_heads, max_q, max_k;
    Tensor cu_seqlens_q, cu_seqlens_k;  // contiguous int32 (batch + 1,), or both absent
    Tensor cache_seqlens;               // contiguous int32 (batch,), or absent
    int64_t new_keys;                   // of each sequence's cache; 0 without one
    Tensor mask;                        // (batch or 1, heads or 1, q or 1, k or 1), bool, float32 or query's dtype
    Tensor alibi_slopes;                // float32 (heads,) or (batch, heads); may be absent
    int64_t window_left, window_right;  // -1: no limit on that side
    int64_t diagonal;                   // of the dense form; the others align to the bottom right
    float scale, softcap;               // softcap 0: none
    double dropout_p;                   // 0: none, seed unused
    uint64_t seed;
    const int32_t* key_ranges = nullptr;  // the kernels' own: the keys of each sequence that take part, first and end
};

// out = softmax(score) . value, lse = logsumexp(score). With a cache, key and value are the caches: first new_key and
// new_value (batch, kv_heads, new_keys, dim) are written to it at positions cache_seqlens[b] … . With cos and sin there
// are as many queries, and these and the new keys are turned before, as RotaryEmbedding has it.
struct AttentionForward : AttentionScore {
    Tensor query, key, value;
    Tensor new_key, new_value;  // absent without new_keys
    Tensor cos, sin;            // (batch, new_keys, rotary_dim), unit stride along rotary_dim; may be absent
    bool interleaved;
    Tensor out, lse;  // out (batch, heads, token, value_dim), lse float32 (batch, heads, token)
};

// ---- Attention, backward --------------------------------------------------------------------------------------------

// Gradients of query, key, value and a floating mask by out's and lse's. All but the last are (batch, heads, token, dim);
// lse and grad_lse are float32 (batch, heads, token). Dense or packed.
struct AttentionBackward : AttentionScore {
    Tensor query, key, value, out, lse;
    Tensor grad_out, grad_lse;                           // grad_lse may be absent
    Tensor grad_query, grad_key, grad_value, grad_mask;  // grad_mask, of mask's shape and dtype, may be absent
};

// ---- How attention spreads its weights ------------------------------------------------------------------------------

// A few numbers of each query's weights, dense: entropy (natural), max_weight and distance are float32 (batch, heads, q),
// argmax int64, of any strides.
struct AttentionSummary : AttentionScore {
    Tensor query, key;
    Tensor entropy, max_weight, argmax, distance;
};

// ---- Additive attention ---------------------------------------------------------------------------------------------

// score = v . tanh(w_query . query + w_key . key);  out = softmax(score) . value. Of AttentionScore only the sizes (one
// head), mask, and dropout apply. query (batch * max_q, query_dim) and key (batch * max_k, key_dim) are matrices of any
// strides, as are w_query and w_key (hidden, …); value (batch, max_k, value_dim) has any strides, v is contiguous; out
// (batch, max_q, value_dim) is contiguous. All are of one dtype but the projections, (batch * max_q, hidden) and
// (batch * max_k, hidden) in contiguous float32.
struct AdditiveAttentionForward : AttentionScore {
    Tensor query, key, value, w_query, w_key, v;
    Tensor out;
    Tensor projected_query, projected_key;  // kept for the backward, or absent
};

// Tensors as above, grad_out of any strides. Gradients lie as their tensors: those of query and key with unit stride
// along their rows, of w_query and w_key along either dimension, of value, v and mask contiguous; grad_mask is float32, of
// mask's shape. One that nobody asked for is absent.
struct AdditiveAttentionBackward : AttentionScore {
    Tensor query, key, value, w_query, w_key, v, projected_query, projected_key;
    Tensor grad_out;
    Tensor grad_query, grad_key, grad_value, grad_w_query, grad_w_key, grad_v, grad_mask;
};

// ---- Linear and feed-forward ----------------------------------------------------------------------------------------

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// pre = x . weight^T + bias;  out = activation(pre) + residual. Matrices of one dtype, of any strides: x (rows, in),
// weight (out, in), the others (rows, out) with unit stride along out; bias is contiguous (out,).
struct LinearForward {
    Activation activation;
    Tensor x, weight, bias, residual;  // the last two may be absent
    Tensor out, pre;                   // pre may be absent
};

// grad_pre = grad_out * activation'(pre);  grad_x = grad_pre . weight, grad_weight = grad_pre^T . x, grad_bias = the
// sum of grad_pre's rows. Shapes as above; grad_out and grad_x have unit stride along their rows, grad_weight along
// either dimension. A gradient that nobody asked for is absent.
struct LinearBackward {
    Activation activation;
    Tensor grad_out, x, weight, pre;  // pre absent without activation
    Tensor grad_x, grad_weight, grad_bias;
};

// hidden = dropout(activation(pre)), or gated dropout(activation(pre_gate) * pre), with pre = x . w1^T + b1 and
// pre_gate = x . w_gate^T;  out = hidden . w2^T + b2 + residual. x (rows, in), w1 and w_gate (hidden, in), w2 (out, hidden),
// any strides; pre, pre_gate (rows, hidden), out and residual (rows, out) with unit stride along their rows; b1 and b2
// contiguous.
struct FeedForwardForward {
    Activation activation;
    Tensor x, w1, b1, w2, b2, w_gate;  // b1, b2 and w_gate may be absent
    Tensor out, pre, pre_gate;         // pre and pre_gate absent where nobody needs them
    double dropout_p;                  // 0: none, seed unused
    uint64_t seed;
    Tensor residual = {};  // may be absent
};

// Shapes as above; grad_x with unit stride along its rows, gradients of weights along either dimension. A gradient that
// nobody asked for is absent.
struct FeedForwardBackward {
    Activation activation;
    Tensor grad_out, x, w1, w2, w_gate, pre, pre_gate;  // w_gate and pre_gate may be absent
    Tensor grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w_gate;
    double dropout_p;
    uint64_t seed;
};

// ---- Linear + cross entropy -----------------------------------------------------------------------------------------

enum class Reduction : int32_t { kNone, kSum, kMean };

// loss = cross entropy of softcap(x . weight^T + bias) + z_loss * lse^2, and the gradients asked for in the same call.
// x, weight, grad_x and grad_weight are (rows, dim) and (classes, dim) with unit stride along dim, neither empty; bias
// and grad_bias contiguous (classes,), target contiguous int64 (rows,) of classes or ignore_index, class_weight
// contiguous float32 (classes,). loss is float32, (rows,) without a reduction and else one element; so is grad_loss,
// what the losses count for.
struct LinearCrossEntropy {
    Reduction reduction;
    Tensor x, weight, bias, target, class_weight, grad_loss;  // bias, class_weight and grad_loss (ones) may be absent
    Tensor loss, grad_x, grad_weight, grad_bias;              // all but loss may be absent
    int64_t ignore_index;
    float label_smoothing, z_loss, softcap;  // softcap 0: none
};

// ---- InfoNCE --------------------------------------------------------------------------------------------------------

// loss = cross entropy of query . [positive; negatives]^T / temperature with the targets 0, 1, …, and, symmetric, its mean
// with that of positive . query^T / temperature; and the gradients asked for in the same call. query, positive and their
// gradients are (n, dim), negatives and theirs (m, dim), of one dtype with unit stride along dim; n and dim are not 0.
// loss and grad_temperature are float32 of one element.
struct InfoNce {
    bool symmetric;
    float temperature, grad_loss;       // grad_loss: what the loss counts for, in the gradients
    Tensor query, positive, negatives;  // negatives may be absent
    Tensor loss, grad_query, grad_positive, grad_negatives, grad_temperature;  // all but loss may be absent
};

// ---- A whole encoder layer ------------------------------------------------------------------------------------------

// One layer of an encoder (csrc/cpu/encoder_layer.cpp). x and out are contiguous (batch * seq, width) matrices, or packed
// ones with cu_seqlens; weights are (out, in) of any strides, biases and norms contiguous vectors; all of one dtype.
struct EncoderLayer {
    int64_t batch, seq;  // packed: seq is the longest sequence
    int64_t heads;
    Tensor x, out;
    Tensor cu_seqlens;  // contiguous int32 (batch + 1,); absent where all sequences are seq long
    Tensor w_query, b_query, w_key, b_key, w_value, b_value, w_out, b_out;  // biases may be absent, here and below
    Tensor norm1_weight, norm1_bias;
    Tensor w1, b1, w2, b2;
    Tensor norm2_weight, norm2_bias;
    Activation activation;
    float scale, eps1, eps2;
    bool norm_first;
};

// ---- A whole decoder layer ------------------------------------------------------------------------------------------

// One layer of a decoder on tokens that follow those in a cache (csrc/cpu/decoder_layer.cpp). x and out are contiguous
// (batch * seq, width) matrices; k_cache and v_cache (batch, kv_heads, capacity, head_dim), of any strides, hold
// cache_seqlens[b] tokens, and seq more are written. w_qkv is ((heads + 2 kv_heads) head_dim, width); all else as in an
// encoder's layer, cos and sin as in AttentionForward.
struct DecoderLayer {
    int64_t batch, seq, heads;
    int64_t longest;  // tokens of a sequence, the new ones with them
    Tensor x, out;
    Tensor k_cache, v_cache, cache_seqlens;  // contiguous int32 (batch,)
    Tensor cos, sin;                         // both absent: no rotary embedding
    Tensor w_qkv, b_qkv, w_out, b_out;       // biases may be absent, here and below
    Tensor norm1_weight, norm1_bias;
    Tensor w1, b1, w2, b2, w_gate;  // w_gate may be absent
    Tensor norm2_weight, norm2_bias;
    Activation activation;
    Norm norm;
    float scale, eps1, eps2;
};

struct RotaryEmbedding {
    Tensor q, k;          // (batch, heads or kv_heads, seq, dim), unit stride along dim
    Tensor cos, sin;      // (batch, seq, rotary_dim), any floating dtype, unit stride along rotary_dim
    Tensor out_q, out_k;  // as q and k
    bool interleaved;
    bool inverse;  // the transposed turn: what the backward does to gradients
};

// clang-format off
// X(function, arguments)
#define FASTATTN_KERNELS(X)                                   \
    /* layer norm and RMS norm */                             \
    X(norm_forward, NormForward)                              \
    X(norm_backward, NormBackward)                            \
    /* attention, forward */                                  \
    X(attention_forward, AttentionForward)                    \
                                                              \
    /* attention, backward */                                 \
    X(attention_backward, AttentionBackward)                  \
                                                              \
    /* how attention spreads its weights */                   \
    X(attention_summary, AttentionSummary)                    \
    /* additive attention */                                  \
    X(additive_attention_forward, AdditiveAttentionForward)   \
    X(additive_attention_backward, AdditiveAttentionBackward) \
                                                              \
    /* linear and feed-forward */                             \
    X(linear_forward, LinearForward)                          \
    X(linear_backward, LinearBackward)                        \
    X(feed_forward_forward, FeedForwardForward)               \
    X(feed_forward_backward, FeedForwardBackward)             \
    /* losses */                                              \
    X(linear_cross_entropy, LinearCrossEntropy)               \
    X(info_nce, InfoNce)                                      \
    /* positions */                                           \
    X(rotary_embedding, RotaryEmbedding)                      \
    /* a whole layer */                                       \
    X(encoder_layer, EncoderLayer)                            \
    X(decoder_layer, DecoderLayer)

// clang-format on

struct Kernels {
    const char* isa;
    int lanes;
#define FASTATTN_FIELD(function, Arguments) void (*function)(const Arguments&);
    FASTATTN_KERNELS(FASTATTN_FIELD)
#undef FASTATTN_FIELD
};

// ---- The choice of instruction set (isa.cpp) ------------------------------------------------------------------------

// The table in use: the best that was built and that this machine runs, or the one that the environment variable
// FASTATTN_CPU_ISA names. Throws std::invalid_argument if that one cannot be used.
const Kernels& kernels();

// Uses another instruction set from now on, in all threads. Throws std::invalid_argument if it cannot be used.
void select_isa(const char* name);

// The i-th usable instruction set (built, and this machine runs it), the best first, emulated ones last; null after
// them.
const char* usable_isa(int i);

}  // namespace fastattn
