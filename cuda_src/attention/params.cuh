// What the host hands to the attention kernels, which plan/params.py reads here. Strides count elements. One struct, by value.
#pragma once
#include "math/dtype.cuh"

namespace fm {

// Bits of AttentionFwdSm90Params::clear_rest: rows of no sequence become 0 in out, -inf in lse, or are left alone.
enum ClearRest : int { kClearNothing = 0, kClearOut = 1, kClearLse = 2 };

struct AttentionFwdParams {
  const void *q, *k, *v;
  void* out;
  float* lse;                                // natural logarithm; null: not wanted
  const void *bias, *alibi_slopes, *sinks;   // null: absent
  const int *cu_seqlens_q, *cu_seqlens_k;    // null: every sequence has seqlen_q, seqlen_k
  const int *seqused_q, *seqused_k;          // null: all rows count
  i64 q_stride_b, q_stride_s, q_stride_h;
  i64 k_stride_b, k_stride_s, k_stride_h;
  i64 v_stride_b, v_stride_s, v_stride_h;
  i64 out_stride_b, out_stride_s, out_stride_h;
  i64 bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k;
  i64 lse_stride_b, lse_stride_h;
  int heads_q, heads_per_key, seqlen_q, seqlen_k;
  int head_dim, head_dim_v, window_left, window_right;  // window: -1 is unlimited; causal arrives as window_right = 0
  int m_blocks, v_blocks, alibi_stride_b, bias_dtype;
  int sinks_dtype, aligned;                  // aligned: every row of q, k, v, out starts at a multiple of 16 bytes
  float softmax_scale, softcap;              // softcap 0: off
};

// For the Hopper kernel: the same, then the order of its work and the tensor maps.
struct AttentionFwdSm90Params : AttentionFwdParams {
  int tiles, batch;      // tiles = m_blocks * v_blocks * heads_q * batch; packed sequences have at most so many
  int section;           // heads (of the whole batch) that are worked on together, so that L2 holds their keys; 0: one after the other
  int ragged;            // rows that exist may follow the last key of a sequence
  int* tile_counter;     // two zeros, which the kernel leaves as zeros; null: every block knows its tiles from the start
  int total_q;           // packed sequences: rows of q and out
  int clear_rest;        // bits of ClearRest
  int pack_bits;         // 2^pack_bits heads of a group share tiles: row r of a tile is query r >> pack_bits of head r % 2^pack_bits
  float to_tanh, softcap_exponent[4];  // of SoftcapExponent in math/softmax.cuh
  float softcap_short[2], query_scale; // of BoundedSoftcapExponent; what queries are multiplied by first
  TensorMap q_map;                          // (head_dim, heads_per_key, seqlen_q, heads_k, batch): boxes of 64 rows
  TensorMap k_map, v_map;                   // (head_dim, seqlen_k, heads_k, batch)
  TensorMap out_map;                        // (head_dim_v, heads_q, seqlen_q, batch): boxes of 16 rows
};

}  // namespace fm
