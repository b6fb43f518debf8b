// What the host hands to the attention kernels, which plan/params.py reads here. Strides count elements. One
// struct, by value.
#pragma once
#include "math/dtype.cuh"

namespace fm {

// Where the rows of a sequence lie that count: all rows of a batch entry; some, which seqused and leftpad
// say; rows of a packed array, which cu_seqlens say.
enum Lengths : int { kEvenLengths = 0, kPaddedLengths = 1, kPackedLengths = 2 };
// section: one head after the other.
enum Section : int { kHeadByHead = 0 };
// Bits of clear_rest: what happens to the rows that belong to no sequence.
enum ClearRest : int { kClearNothing = 0, kClearOut = 1, kClearLse = 2 };  // 0 in out, -inf in lse

struct AttentionFwdParams {
  const void *q, *k, *v;
  void* out;
  const void* bias;                          // null: none
  float* lse;                                // natural logarithm; null: not wanted
  const void *alibi_slopes, *sinks;          // null: none
  const int *cu_seqlens_q, *cu_seqlens_k;    // of packed sequences
  const int *seqused_q, *seqused_k;          // how many first rows of a sequence may count; null: all
  const int *leftpad_q, *leftpad_k;          // the first of a batch entry's rows that counts; null: 0
  u32* mask_words;                           // of a boolean mask (mask_words.cuh)
  int* mask_tiles;                           // lists of the key tiles that it leaves, each behind its length
  i64 q_stride_b, q_stride_s, q_stride_h;
  i64 k_stride_b, k_stride_s, k_stride_h;
  i64 v_stride_b, v_stride_s, v_stride_h;
  i64 out_stride_b, out_stride_s, out_stride_h;
  i64 bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k;
  i64 lse_stride_b, lse_stride_h;
  int heads_q, heads_per_key, seqlen_q, seqlen_k;
  int head_dim, head_dim_v;
  int window_left, window_right;             // keys on each side; -1: all. Causal arrives as window_right = 0
  int m_blocks, v_blocks;                    // tiles along the queries of a head; tiles along head_dim_v
  int alibi_stride_b, bias_dtype;            // alibi_stride_b: 0 where all of the batch have the same slopes
  int sinks_dtype, aligned;                  // aligned: rows of q, k, v, out start at multiples of 16 bytes
  int lengths;                               // one of Lengths
  float softmax_scale, softcap;              // softcap: 0 is none
};

// For the Hopper kernel: the same, then the order of its work and the tensor maps.
struct AttentionFwdSm90Params : AttentionFwdParams {
  int tiles, batch;      // tiles: m_blocks * v_blocks * heads_q * batch; the most that packed sequences have
  int section;           // heads worked on together, so many that L2 holds their keys; or kHeadByHead
  int* tile_counter;     // two zeros, left as zeros: blocks take tiles by it; null: each counts alone
  int total_q;           // rows of q and out, of packed sequences; else 0
  int clear_rest;        // bits of ClearRest
  int may_unsee;         // 1: some queries may see no key
  int pack_bits;         // 2^pack_bits heads share tiles: row r: query r >> pack_bits of head r % 2^pack_bits
  float to_tanh, softcap_exponent[4];        // of SoftcapExponent in math/softmax.cuh
  float softcap_short[2], query_scale;       // of BoundedSoftcapExponent; the factor of its queries
  int mask_batches;      // entries that have lists: each, or one for all
  int mask_lists;        // lists of such an entry for a tile of queries: one for all heads, or one of each
  int mask_list;         // elements that a list has room for
  i64 mask_stride_b, mask_stride_h, mask_stride_q;  // words of the mask
  TensorMap q_map;         // (head_dim, heads_per_key, seqlen_q, heads_k, batch): boxes of 64 rows
  TensorMap k_map, v_map;  // (head_dim, seqlen_k, heads_k, batch)
  TensorMap out_map;       // (head_dim_v, heads_q, seqlen_q, batch): boxes of 16 rows
  TensorMap bias_map;      // (seqlen_k, heads_per_key, seqlen_q, heads_k, batch): tiles of bias_sm90.cuh
};

}  // namespace fm
