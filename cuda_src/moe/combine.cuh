// The way back to the tokens: out[t] = sum over k of topk_weights[t, k] * y[inverse_indices[t, k]] (+
// shared_gate[t] * shared[t]).
//
// y has one row of `columns` values for each assignment, in the order of the experts; a choice without a row
// adds nothing. Sums run in fp32 in the order of k, the shared expert last, and are rounded once: the same
// bits in every run. Overwrites out.
//
// A thread takes 16 bytes of a row. Rows of y are read once and never again, and several are under way at a
// time. A few tokens are the work of blocks of one warp, so that more multiprocessors fetch rows.
#pragma once
#include "moe/assignments.cuh"
#include "moe/params.cuh"
#include "ptx/cluster.cuh"

namespace fm {

template <class Element_, int kThreads_ = 256>
struct MoeCombine {
  using Element = Element_;
  static constexpr int kThreads = kThreads_, kPerChunk = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kTogether = 8;  // rows under way
  struct Smem {
    static constexpr int kBytes = 4 * 32;  // the row of y of each assignment, where it is found here
  };

  FM_DEVICE static void run(const MoeCombineParams& p) {
    extern __shared__ __align__(16) u8 smem[];
    int* s_rows = reinterpret_cast<int*>(smem);
    // Ids are older than the products, which have waited for them.
    if (p.topk_ids != nullptr) find_rows(p, s_rows);
    start_after_last_grid();
    const int chunks = p.columns / kPerChunk;
    const i64 work = static_cast<i64>(p.tokens) * chunks;
    for (i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < work;
         i += static_cast<i64>(gridDim.x) * kThreads) {
      const i64 t = i / chunks;
      add_rows(p, s_rows, t, static_cast<int>(i - t * chunks));
    }
  }

  FM_DEVICE static void find_rows(const MoeCombineParams& p, int* s_rows) {
    if (warp_id() == 0) {
      const SelfSorted sorted(p, p.experts, p.tokens * p.top_k);
      s_rows[lane_id()] = sorted.expert < 0 ? -1 : sorted.place;
    }
    __syncthreads();
  }

  FM_DEVICE static void add_rows(const MoeCombineParams& p, const int* s_rows, i64 t, int chunk) {
    const int* rows = p.topk_ids == nullptr ? p.inverse_indices : s_rows;
    float sum[kPerChunk] = {};
    for (int first = 0; first < p.top_k; first += kTogether) {
      int row[kTogether];
      float weight[kTogether];
      uint4 words[kTogether];
      // All loads of a kind are under way before one of them is waited for.
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        row[j] = first + j < p.top_k ? rows[t * p.top_k + first + j] : -1;
      load_weights(p, t, first, weight);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        words[j] = make_uint4(0, 0, 0, 0);
        if (row[j] >= 0)
          words[j] = reinterpret_cast<const uint4*>(static_cast<const Element*>(p.y) +
                                                    static_cast<i64>(row[j]) * p.columns)[chunk];
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) add(sum, words[j], row[j] >= 0 ? weight[j] : 0.f);
    }
    if (p.shared != nullptr) {
      const float gate =
          p.shared_gate == nullptr ? 1.f : load_float(p.shared_gate, t * p.shared_gate_stride, p.gate_dtype);
      add(sum, reinterpret_cast<const uint4*>(static_cast<const Element*>(p.shared) + t * p.columns)[chunk],
          gate);
    }
    Element* g_out = static_cast<Element*>(p.out) + t * p.out_stride + chunk * kPerChunk;
    write(g_out, sum, p.aligned != 0);
  }

  FM_DEVICE static void load_weights(const MoeCombineParams& p, i64 t, int first,
                                     float (&weight)[kTogether]) {
    auto load = [&](int dtype) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        weight[j] =
            first + j < p.top_k
                ? load_float(p.topk_weights, t * p.weights_stride_t + (first + j) * p.weights_stride_k, dtype)
                : 0.f;
    };
    if (p.topk_weights == nullptr) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) weight[j] = 1.f;
    } else if (p.weights_dtype == kFP32) {
      load(kFP32);
    } else if (p.weights_dtype == kBF16) {
      load(kBF16);
    } else {
      load(kFP16);
    }
  }

  FM_DEVICE static void add(float (&sum)[kPerChunk], const uint4& words, float weight) {
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      float x;
      if constexpr (sizeof(Element) == 4) x = __uint_as_float(word[i]);
      else x = to_float(Element{static_cast<u16>(word[i / 2] >> (i % 2 * 16))});
      sum[i] = fmaf(weight, x, sum[i]);
    }
  }

  FM_DEVICE static void write(Element* g_out, const float (&sum)[kPerChunk], bool aligned) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) word[i] = __float_as_uint(sum[i]);
      else word[i] = pack2<Element>(sum[2 * i], sum[2 * i + 1]);
    }
    if (aligned) {
      *reinterpret_cast<uint4*>(g_out) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) {
        if constexpr (sizeof(Element) == 4) reinterpret_cast<u32*>(g_out)[i] = word[i];
        else reinterpret_cast<u16*>(g_out)[i] = static_cast<u16>(word[i / 2] >> (i % 2 * 16));
      }
    }
  }
};

}  // namespace fm
