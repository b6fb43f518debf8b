// A bias whose rows the copy engine cannot fetch, written again so that it can: rows of keys side by side,
// each from a multiple of 16 bytes on. Axes that the bias is spread over stay single.
#pragma once
#include "prelude.cuh"

namespace fm {

// Strides count elements.
struct AttentionBiasRowsParams {
  const void* bias;
  void* bias_rows;
  i64 bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k;
  int heads, queries, keys;  // of the result, but for the batch; 1 where the bias is spread
  int row_chunks;            // of 16 bytes in a row of the result
  i64 chunks;                // in all
  int along_queries;         // 1: neighbours in memory are queries rather than keys
};

template <class Value>
struct AttentionBiasRows {
  using Params = AttentionBiasRowsParams;
  enum : int { kThreads = 256, kPerChunk = 16 / static_cast<int>(sizeof(Value)) };
  struct Smem {
    enum { kBytes = 0 };
  };

  // Neighbouring threads read neighbours: chunks of a row, or the same chunk of several rows.
  FM_DEVICE static void run(const Params& p) {
    const i64 step = static_cast<i64>(gridDim.x) * kThreads;
    for (i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < p.chunks; i += step) {
      i64 row = i / p.row_chunks;
      int chunk = static_cast<int>(i % p.row_chunks);
      int query = static_cast<int>(row % p.queries);
      if (p.along_queries) {
        const i64 matrix = i / (static_cast<i64>(p.queries) * p.row_chunks);
        query = static_cast<int>(i % p.queries);
        chunk = static_cast<int>(i / p.queries % p.row_chunks);
        row = matrix * p.queries + query;
      }
      const i64 matrix = row / p.queries;
      const i64 from = matrix / p.heads * p.bias_stride_b + matrix % p.heads * p.bias_stride_h;
      copy(p, from + query * p.bias_stride_q, row, chunk);
    }
  }

  FM_DEVICE static void copy(const Params& p, i64 from, i64 row, int chunk) {
    const Value* g_from = static_cast<const Value*>(p.bias) + from;
    union {
      uint4 all;
      Value each[kPerChunk];
    } found;
    found.all = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kPerChunk; ++j)
      if (chunk * kPerChunk + j < p.keys) found.each[j] = g_from[(chunk * kPerChunk + j) * p.bias_stride_k];
    static_cast<uint4*>(p.bias_rows)[row * p.row_chunks + chunk] = found.all;
  }
};

}  // namespace fm
