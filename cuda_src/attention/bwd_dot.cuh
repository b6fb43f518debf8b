// What the backward of attention needs of each query of each head:
//
//   row_delta = sum over columns of dout * out, less dlse      row_lse = lse, +inf where that is -inf
//
// out, dout (batch, seqlen, heads, head_dim_v), any strides with a contiguous last dimension; lse, dlse
// (batch, heads, seqlen), any strides. Overwrites row_lse and row_delta, (batch, heads, seqlen). Packed
// arrays are one entry. exp(s - inf) is 0, so that a query without keys adds nothing. Of rows that do not
// count it writes what they hold; nobody reads it. The same bits in every run: sums have one order.
//
// kLanes lanes take kAtOnce rows of a head, 16 bytes at a time.
#pragma once
#include "attention/bwd_params.cuh"

namespace fm {

template <class Element_, int kLanes_>
struct AttentionBwdDot {
  using Element = Element_;
  static constexpr int kThreads = 256, kLanes = kLanes_, kAtOnce = 2,
                       kPerChunk = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kRows = kAtOnce * kThreads / kLanes;  // of a block, all of one head
  struct Smem {
    static constexpr int kBytes = 0;
  };

  FM_DEVICE static void run(const AttentionBwdDotParams& p) {
    if (blockIdx.x == 0 && threadIdx.x < kTileCounters) p.tile_counters[threadIdx.x] = 0;
    for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < p.turns; i += gridDim.x * kThreads)
      p.tile_counters[kTileCounters + i] = 0;
    // All indices fit into 32 bits, whose division is cheap.
    const int head = static_cast<int>(blockIdx.x) % p.heads, first = blockIdx.x / p.heads * kRows;
    const int col = threadIdx.x % kLanes * kPerChunk;
    const Element *g_out[kAtOnce], *g_dout[kAtOnce];
    uint4 out[kAtOnce], dout[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + threadIdx.x / kLanes + i * (kRows / kAtOnce);
      const int b = row / p.seqlen, s = row % p.seqlen;
      g_out[i] = static_cast<const Element*>(p.out) + b * p.out_stride_b + s * p.out_stride_s +
                 head * p.out_stride_h;
      g_dout[i] = static_cast<const Element*>(p.dout) + b * p.dout_stride_b + s * p.dout_stride_s +
                  head * p.dout_stride_h;
      out[i] = dout[i] = make_uint4(0, 0, 0, 0);
      if (row >= p.rows || col >= p.head_dim_v) continue;  // all lanes go on, to the sum
      out[i] = load_chunk(g_out[i] + col, p.aligned != 0);
      dout[i] = load_chunk(g_dout[i] + col, p.aligned != 0);
    }
    clear(p);  // while the rows come
    float sum[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + threadIdx.x / kLanes + i * (kRows / kAtOnce);
      sum[i] = dot_chunk(out[i], dout[i]);
      if (row < p.rows)
        for (int c = col + kLanes * kPerChunk; c < p.head_dim_v; c += kLanes * kPerChunk)
          sum[i] +=
              dot_chunk(load_chunk(g_out[i] + c, p.aligned != 0), load_chunk(g_dout[i] + c, p.aligned != 0));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
      const int row = first + threadIdx.x / kLanes + i * (kRows / kAtOnce);
      if (row < p.rows && threadIdx.x % kLanes == 0) finish(p, row / p.seqlen, row % p.seqlen, head, sum[i]);
    }
  }

  FM_DEVICE static void clear(const AttentionBwdDotParams& p) {
    if (p.dq_sums == nullptr) return;
    for (i64 i = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) * 4; i < p.dq_values;
         i += static_cast<i64>(gridDim.x) * kThreads * 4)
      *reinterpret_cast<float4*>(p.dq_sums + i) = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  FM_DEVICE static void finish(const AttentionBwdDotParams& p, int b, int s, int head, float sum) {
    const float lse = p.lse[b * p.lse_stride_b + head * p.lse_stride_h + s * p.lse_stride_s];
    if (p.dlse != nullptr) sum -= p.dlse[b * p.dlse_stride_b + head * p.dlse_stride_h + s * p.dlse_stride_s];
    const i64 at = (static_cast<i64>(b) * p.heads + head) * p.seqlen + s;
    p.row_lse[at] = lse == -infinity() ? infinity() : lse;
    p.row_delta[at] = sum;
  }

  FM_DEVICE static uint4 load_chunk(const Element* g_x, bool aligned) {
    if (aligned) return *reinterpret_cast<const uint4*>(g_x);
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4)
        word[i] = reinterpret_cast<const u32*>(g_x)[i];
      else
        word[i] = g_x[2 * i].bits | static_cast<u32>(g_x[2 * i + 1].bits) << 16;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  FM_DEVICE static float dot_chunk(const uint4& x, const uint4& y) {
    return dot_word(x.x, y.x) + dot_word(x.y, y.y) + (dot_word(x.z, y.z) + dot_word(x.w, y.w));
  }
  FM_DEVICE static float dot_word(u32 x, u32 y) {
    if constexpr (sizeof(Element) == 4)
      return __uint_as_float(x) * __uint_as_float(y);
    else
      return fmaf(low_of<Element>(x), low_of<Element>(y), high_of<Element>(x) * high_of<Element>(y));
  }
};

}  // namespace fm
