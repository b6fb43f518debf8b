// What the host hands to the kernels of attention's backward. Strides count elements. One struct for each
// kernel, by value.
#pragma once
#include "attention/params.cuh"

namespace fm {

// The sums of the rows: queries of all heads, alone.
struct AttentionBwdDotParams {
  const void *out, *dout;
  const float *lse, *dlse;                   // dlse null: 0
  float *row_lse, *row_delta;                // (entries, heads, rows), or (heads, rows) of packed sequences
  float* dq_sums;                            // becomes 0; null: there is none
  int* tile_counters;                        // kTileCounters of them and the turns, become 0
  i64 out_stride_b, out_stride_s, out_stride_h;
  i64 dout_stride_b, dout_stride_s, dout_stride_h;
  i64 lse_stride_b, lse_stride_h, lse_stride_s;
  i64 dlse_stride_b, dlse_stride_h, dlse_stride_s;
  i64 dq_values;                             // of dq_sums, a multiple of 4
  int rows;                                  // of all entries, or of the packed array
  int seqlen, heads;                         // rows of an entry, or of the packed array; query heads
  int head_dim_v, aligned;                   // aligned: rows of out and dout start at multiples of 16 bytes
  int turns;                                 // behind tile_counters: one for each 64 x 64 values of dq_sums, or 0
};

// The gradient of the sinks.
struct AttentionBwdSinksParams {
  const float *row_lse, *row_delta;          // as AttentionBwdDotParams leaves them
  const void* sinks;
  void* dsinks;                              // (heads_q,), of the sinks' type
  const int *cu_seqlens_q, *seqused_q, *leftpad_q;
  int batch, heads_q, seqlen_q;              // seqlen_q: rows of an entry
  int total_q;                               // rows of the packed array
  int lengths, sinks_dtype;                  // lengths: one of Lengths
};

// Gradients of q, k and v.
struct AttentionBwdParams {
  const void *q, *k, *v, *dout;
  void *dq, *dk, *dv, *dbias;
  float* dq_sums;                            // sums of dq, as bwd_convert.cuh has them
  int* tile_counters;                        // tiles that blocks of the Hopper kernel have taken, by kWanted
  const void* bias;                          // null: none
  const float *row_lse, *row_delta;          // of each query of each head (bwd_dot.cuh)
  const void* alibi_slopes;                  // null: none
  const int *cu_seqlens_q, *cu_seqlens_k;    // as in AttentionFwdParams
  const int *seqused_q, *seqused_k;
  const int *leftpad_q, *leftpad_k;
  i64 q_stride_b, q_stride_s, q_stride_h;
  i64 k_stride_b, k_stride_s, k_stride_h;
  i64 v_stride_b, v_stride_s, v_stride_h;
  i64 dout_stride_b, dout_stride_s, dout_stride_h;
  i64 dq_stride_b, dq_stride_s, dq_stride_h;
  i64 dk_stride_b, dk_stride_s, dk_stride_h;
  i64 dv_stride_b, dv_stride_s, dv_stride_h;
  i64 bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k;
  i64 row_stride_b, row_stride_h;            // of row_lse and row_delta
  int heads_q, heads_per_key, seqlen_q, seqlen_k;
  int head_dim, head_dim_v;
  int window_left, window_right;             // keys on each side; -1: all. Causal arrives as window_right = 0
  int blocks, v_blocks;                      // blocks along the longest sequence; tiles along head_dim_v
  int alibi_stride_b, bias_dtype;
  int aligned, lengths;                      // aligned: rows of all arrays start at multiples of 16 bytes
  float softmax_scale, softcap;              // softcap: 0 is none
  int dq_blocks;                             // blocks of 64 queries in dq_sums from head to head
};

// For the Hopper kernel: the same, then the tensor maps, (head_dim, seqlen, heads, batch) in boxes of 64
// columns.
struct AttentionBwdSm90Params : AttentionBwdParams {
  int tiles;                                 // of all heads and entries
  int section;                               // heads, or groups that share keys, that are worked on together
  int sequences;                             // entries, or packed sequences
  int ordered;                               // blocks add to dq_sums one after the other (turns_of)
  int at_once;                               // all blocks run at once, and tiles may wait for later ones
  TensorMap q_map, k_map, v_map, dout_map;
};

// The same with a bias: (seqlen_k, seqlen_q, heads, batch), in boxes of bwd_bias_tiles_sm90.cuh. dbias, if not
// null, is written beside dq, in boxes of 16 queries.
struct AttentionBwdBiasedSm90Params : AttentionBwdSm90Params {
  TensorMap bias_map, dbias_map;
};

// Tiles are worked on section by section. Of a section those of all heads with the same place in their head
// come one after the other: where the first ones have the most to do, no block has much more left in the end
// than the others.
struct TileOfHead {
  int tile, head;  // head, or group of heads that share keys: of all entries
};
FM_DEVICE TileOfHead tile_of_head(int index, int tiles_of_head, int heads, int section) {
  const int before = index / (tiles_of_head * section) * section, wide = min(section, heads - before);
  index -= before * tiles_of_head;
  return {index / wide, before + index % wide};
}

// Packed sequences have their tiles one behind the other; up to one too many for each.
template <int kRows>
FM_DEVICE int first_tile(const int* cu_seqlens, int batch) {
  return cu_seqlens[batch] / kRows + batch;
}
template <int kRows>
FM_DEVICE int sequence_of_tile(const int* cu_seqlens, int sequences, int tile) {
  int batch = 0;
  for (int step = 1 << (31 - __clz(sequences)); step > 0; step /= 2)
    if (batch + step < sequences && first_tile<kRows>(cu_seqlens, batch + step) <= tile) batch += step;
  return batch;
}

// The gradient of a bias, which has 1 or all along each axis.
struct AttentionBwdBiasParams : AttentionBwdParams {
  i64 dbias_stride_b, dbias_stride_h, dbias_stride_q, dbias_stride_k;
  int batch;                                 // entries of q
  int bias_batch, bias_heads, bias_queries, bias_keys;  // sizes of the bias
  int tiles;                                 // of the bias, over all its entries and heads
};

// For the Hopper kernel: the same, then the tensor maps, as above.
struct AttentionBwdBiasSm90Params : AttentionBwdBiasParams {
  TensorMap q_map, k_map, v_map, dout_map, bias_map;
};

// dq from its sums.
struct AttentionBwdConvertParams {
  const float* dq_sums;
  void* dq;
  const int *cu_seqlens_q, *seqused_q, *leftpad_q;
  i64 dq_stride_b, dq_stride_s, dq_stride_h;
  int blocks, parts;                         // blocks of 64 queries of the longest sequence; parts of 64 columns
  int dq_blocks, lengths;                    // as above
  int heads, seqlen_q, head_dim;
  float softmax_scale;
};

// The first block of a sequence's first head in dq_sums. Packed sequences lie one behind the other, with up to
// one block more for each that begins inside of one.
FM_DEVICE i64 first_block_of_sums(int lengths, const int* cu_seqlens_q, int batch, int heads, int dq_blocks) {
  return lengths == kPackedLengths ? cu_seqlens_q[batch] / 64 + batch
                                   : static_cast<i64>(batch) * heads * dq_blocks;
}

// Of queries, in shared memory.
template <int kQueries>
struct Statistics {
  float lse[kQueries], delta[kQueries];
  static constexpr int kBytes = 2 * 4 * kQueries;
};

// Bits of kWanted, a template argument of the kernels.
enum Gradient : int { kGradQ = 1, kGradK = 2, kGradV = 4 };
enum : int { kTileCounters = 8 };  // one for each kWanted

// Of a kernel that adds in order: blocks that have added to each 64 x 64 values of dq_sums.
FM_DEVICE u32* turns_of(const AttentionBwdParams& p) {
  return reinterpret_cast<u32*>(p.tile_counters) + kTileCounters;
}

// The members that say where sequences lie and what happens to scores, as the forward has them.
FM_DEVICE AttentionFwdParams forward_params(const AttentionBwdParams& p) {
  AttentionFwdParams f = {};
  f.bias = p.bias;
  f.alibi_slopes = p.alibi_slopes;
  f.cu_seqlens_q = p.cu_seqlens_q, f.cu_seqlens_k = p.cu_seqlens_k;
  f.seqused_q = p.seqused_q, f.seqused_k = p.seqused_k;
  f.leftpad_q = p.leftpad_q, f.leftpad_k = p.leftpad_k;
  f.bias_stride_q = p.bias_stride_q, f.bias_stride_k = p.bias_stride_k;
  f.seqlen_q = p.seqlen_q, f.seqlen_k = p.seqlen_k;
  f.alibi_stride_b = p.alibi_stride_b, f.bias_dtype = p.bias_dtype;
  f.lengths = p.lengths;
  f.softmax_scale = p.softmax_scale, f.softcap = p.softcap;
  return f;
}

}  // namespace fm
