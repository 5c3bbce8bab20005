"""Attention, backward, dense and packed (Dao et al., 2022): what the scores were is computed again from query and key.

    s = score(query . key),   p = softmax(s),   w = dropout(p),   y = dropout(grad_out . value)
    delta = rowsum(p * y) - grad_lse  = rowsum(grad_out * out) - grad_lse
    g = p * (y - delta)                                              gradient of s, and of a floating mask
    u = g * (1 - tanh^2)  with a soft cap, else g                    gradient of scale * query . key
    grad_value = w^T . grad_out,   grad_key = scale * u^T . query,   grad_query = scale * u . key

Three kernels, and a fourth for a mask's gradient (attention_mask_gradient.py):

    attention_backward_rows    a program a block of queries: top, shift and delta of each row
    attention_backward_query   a program a block of queries, walks keys:  grad_query
    attention_backward_key     a program a block of keys, walks queries of all heads of the group:  grad_key, grad_value

so that every sum is a loop, and none an atomic. Weights are p = exp2((s - top) * factor + shift). What lse and out left to the
backward would give top = 0, shift = -lse * log2(e) and delta = rowsum(grad_out * out), and for most rows that is what
attention_backward_rows writes. But it leaves the roundings of lse and out in every weight and gradient of the row, which is
too much where lse is large, and where one key has almost all the weight and its gradient cancels to almost nothing (a row of
one key: to nothing). Rows with a large lse, or of few keys, are gathered from the keys instead: top = max(s),
shift = -log2(sum of exp2), delta = sum of p * y, as exact as a softmax of the whole row.

Work: 2 q k (5 head_dim and value_dim, of which the two products that both kernels need are done twice: 4 head_dim +
3 value_dim) flops a head, half of it if causal, twice q k exponentials; gathered rows 2 q k (head_dim + value_dim) and q k
exponentials more. Memory: query, key, value, out, grad_out and the three gradients, the blocks again from the L2 cache.
"""

import triton
from torch import Tensor

from ._launch import launch
from .attention_backward_key import attention_backward_key
from .attention_backward_query import attention_backward_query
from .attention_backward_rows import attention_backward_rows
from .attention_problem import Problem, heads_of


def backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Fills the gradients of query, key and value. Returns the rows' terms, from which a mask's gradient follows."""
    grad_query, grad_key, grad_value = map(heads_of, grads)
    given, received = problem.given, heads_of(grad_out)
    terms = lse.new_empty((3, *lse.shape))
    stride_term = lse.numel()
    config = problem.config("attention_backward_rows")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_backward_rows,
        (blocks * problem.heads * problem.batch,),
        given,
        received,
        heads_of(out),
        lse.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        terms,
        stride_term,
        blocks,
        config=config,
    )
    config = problem.config("attention_backward_query")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_backward_query,
        (blocks * problem.heads * problem.batch,),
        given,
        *problem.tiles(config, config.tiles["KEYS"], problem.key, problem.value),
        received,
        terms,
        grad_query,
        stride_term,
        blocks,
        config=config,
    )
    config = problem.config("attention_backward_key")
    blocks = triton.cdiv(problem.k_len, config.tiles["KEYS"])
    tiles: list = [None, None]
    if problem.cu_seqlens_q is None:  # packed ones would need a loop of their own for the ends of sequences, and spill
        tiles = problem.tiles(config, config.tiles["QUERIES"], problem.query, grad_out)
    launch(
        attention_backward_key,
        (blocks * problem.kv_heads * problem.batch,),
        given,
        *tiles,
        received,
        terms,
        grad_key,
        grad_value,
        stride_term,
        problem.kv_heads,
        blocks,
        config=config,
    )
    return terms
