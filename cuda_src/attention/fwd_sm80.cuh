// Attention forward for every GPU from sm_80 on.
//
//   S = scores(q k^T), masked to the band that causal, window and sequence ends leave
//   P = softmax(S)    out = P v    lse = log sum exp S (natural logarithm), sinks included
//
// q (batch, seqlen_q, heads_q, head_dim), k, v (batch, seqlen_k, heads_k, ...), any strides with a contiguous
// last dimension, or packed tokens with cu_seqlens. Query head h reads key head h / heads_per_key. head_dim
// and head_dim_v are multiples of 8 up to the compiled sizes; the rest of a row is filled with zeros in
// shared memory. A head_dim_v beyond the compiled size is cut into v_blocks, each with its own pass over the
// scores. Overwrites the rows of out and lse that exist, touches no others. A row that sees no key gives out
// 0 and lse -inf. Same bits in every run: one block owns a row from first key to last.
//
// One block takes kBlockM queries and walks over the keys in tiles of kBlockN. K and V have one buffer each;
// K of the next tile travels while V is used, V while K is used (FlashAttention-2's order), and two blocks
// per SM hide each other's barriers.
#pragma once
#include "attention/bias_sm80.cuh"
#include "attention/keys.cuh"
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "math/softmax.cuh"
#include "tile/gemm.cuh"
#include "tile/mask.cuh"
#include "tile/smem.cuh"

namespace fm {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kWarps_,
          class Variant_>
struct AttentionFwdSm80 {
  using Element = Element_;
  using Variant = Variant_;
  using Keys = RowKeys;  // where queries and keys lie (attention/keys.cuh)
  static_assert(AttentionKeys<Keys>);
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kM = kBlockM / (16 * kWarps);  // accumulator tiles of 16 rows that a warp owns
  static constexpr bool kAligned = Variant::kAligned;
  static_assert(kM * 16 * kWarps == kBlockM, "warps own whole tiles of 16 rows");

  using TileQ = SmemTile<Element, kBlockM, kHeadDim>;
  using TileK = SmemTile<Element, kBlockN, kHeadDim>;
  using TileV = SmemTile<Element, kBlockN, kHeadDimV>;
  using TileO = SmemTile<Element, kBlockM, kHeadDimV>;
  using Bias = decltype(pick<Variant::kFetchesBias>(BiasInRegisters<kM, kBlockN / 8>(), NoBiasInRegisters()));
  // What a block works on. It stays in shared memory: in the loop every register is taken.
  struct Work {
    const Element *g_k, *g_v;
    const void* g_bias;  // of the first query and key; null: none
    i64 q_row;  // row of the arrays where the block's first query lies
    BandMask band;
    int batch, head, m0, v_block;
  };
  struct Smem {
    static constexpr int kWork = 0, kQ = 128, kK = kQ + TileQ::kBytes, kV = kK + TileK::kBytes;
    static constexpr int kO = kQ;  // the output takes the place of q, k, v when they are done
    static constexpr int kBytes = max_of(kV + TileV::kBytes, kO + TileO::kBytes);
    static_assert(sizeof(Work) <= kQ);
  };

  FM_DEVICE static bool find_work(const AttentionFwdParams& p, Work& w) {
    int index = static_cast<int>(blockIdx.x);
    // Late queries see the most keys under a causal mask: they start first, the short blocks fill the tail.
    const int m_block = p.m_blocks - 1 - index % p.m_blocks;
    index /= p.m_blocks;
    w.v_block = index % p.v_blocks;
    index /= p.v_blocks;
    w.head = index % p.heads_q;
    w.batch = index / p.heads_q;
    w.m0 = m_block * kBlockM;

    const SequenceOf<i64> found = Keys::sequence_from(p, w.batch, w.m0);
    if (w.m0 >= found.seqlen_q) return false;
    w.q_row = found.q_row;
    const int shift = found.seqlen_k - found.seqlen_q;
    w.band = BandMask{found.seqlen_q, found.seqlen_k, shift, p.window_left, p.window_right, 0};

    const int head_k = w.head / p.heads_per_key;
    w.g_k = static_cast<const Element*>(p.k) + w.batch * p.k_stride_b + found.k_row * p.k_stride_s +
            head_k * p.k_stride_h;
    w.g_v = static_cast<const Element*>(p.v) + w.batch * p.v_stride_b + found.k_row * p.v_stride_s +
            head_k * p.v_stride_h + w.v_block * kHeadDimV;
    if constexpr (Variant::kFetchesBias) {
      const i64 first = w.batch * p.bias_stride_b + w.head * p.bias_stride_h +
                        (found.q_row - w.m0) * p.bias_stride_q + found.k_row * p.bias_stride_k;
      const int bytes = p.bias_dtype == kFP32 ? 4 : p.bias_dtype == kBool ? 1 : 2;
      w.g_bias = p.bias == nullptr ? nullptr : static_cast<const u8*>(p.bias) + first * bytes;
    }
    return true;
  }

  FM_DEVICE static void load_q(const AttentionFwdParams& p, const Work& w, u32 s_base) {
    const Element* g_q = static_cast<const Element*>(p.q) + w.batch * p.q_stride_b + w.q_row * p.q_stride_s +
                         w.head * p.q_stride_h;
    load_tile<TileQ, kThreads, kAligned>(s_base + Smem::kQ, g_q, p.q_stride_s, w.band.rows - w.m0,
                                         p.head_dim / TileQ::kPerChunk, p.aligned != 0);
  }

  FM_DEVICE static void load_k(const AttentionFwdParams& p, const Work& w, u32 s_base, int n0) {
    load_tile<TileK, kThreads, kAligned>(s_base + Smem::kK, w.g_k + n0 * p.k_stride_s, p.k_stride_s,
                                         w.band.cols - n0, p.head_dim / TileK::kPerChunk, p.aligned != 0);
    cp_async_commit_group();
  }

  FM_DEVICE static void load_v(const AttentionFwdParams& p, const Work& w, u32 s_base, int n0) {
    load_tile<TileV, kThreads, kAligned>(
        s_base + Smem::kV, w.g_v + n0 * p.v_stride_s, p.v_stride_s, w.band.cols - n0,
        p.head_dim_v / TileV::kPerChunk - w.v_block * TileV::kChunks, p.aligned != 0);
    cp_async_commit_group();
  }

  FM_DEVICE static void run(const AttentionFwdParams& p) {
    extern __shared__ __align__(128) u8 smem[];
    const u32 s_base = smem_address(smem);
    const Work& w = *reinterpret_cast<const Work*>(smem + Smem::kWork);
    {
      Work found;
      if (!find_work(p, found)) return;
      if (threadIdx.x == 0) *reinterpret_cast<Work*>(smem + Smem::kWork) = found;
      __syncthreads();
    }
    const int warp_row = warp_id() * 16 * kM;
    const int n_begin = w.band.first(w.m0) / kBlockN;
    const int n_end = div_up(max(w.band.last(min(w.m0 + kBlockM, w.band.rows) - 1) + 1, 0), kBlockN);

    float r_out[kM][kHeadDimV / 8][4] = {};
    OnlineSoftmax<kM> softmax;

    if (n_begin < n_end) {
      load_q(p, w, s_base);
      load_k(p, w, s_base, n_begin * kBlockN);
    }
#pragma unroll 1
    for (int n = n_begin; n < n_end; ++n) {
      cp_async_wait_group<0>();
      __syncthreads();  // K(n) is here for all, and nobody reads V(n - 1) any more
      load_v(p, w, s_base, n * kBlockN);

      Bias bias;
      if constexpr (Variant::kFetchesBias)
        bias.fetch(p, w.g_bias, w.m0 + warp_row, n * kBlockN, w.band);
      float r_s[kM][kBlockN / 8][4];
      gemm_ss_nt<Element, TileQ, TileK>(r_s, s_base + Smem::kQ, warp_row, s_base + Smem::kK);
      change_scores(p, w, r_s, bias, w.m0 + warp_row, n * kBlockN);

      cp_async_wait_group<0>();
      __syncthreads();  // V(n) is here for all, and nobody reads K(n) any more
      if (n + 1 < n_end) load_k(p, w, s_base, (n + 1) * kBlockN);

      float correction[2 * kM];
      softmax.template update<Variant::kWide>(r_s, Variant::scale(p), correction);
      if (any_differs(correction)) scale_rows(r_out, correction);
      gemm_rs_nn<Element, TileV>(r_out, r_s, s_base + Smem::kV);
    }
    write_output(p, w, s_base, warp_row, r_out, softmax);
  }

  template <int kN>
  FM_DEVICE static void change_scores(const AttentionFwdParams& p, const Work& w, float (&r_s)[kM][kN][4],
                                      const Bias& bias, int row, int col) {
    const BandMask band = w.band;
    if constexpr (Variant::kScore) Variant::apply(p, r_s, w.batch, w.head, row, col, band);
    bias.add(p, r_s);
    if (!band.template cuts<16 * kM, kBlockN>(row, col)) return;
    for_each_score(r_s, row, col, [&](float& s, int i, int j) {
      if (j < band.first(i) || j > band.last(i)) s = -infinity();
    });
  }

  FM_DEVICE static void write_output(const AttentionFwdParams& p, const Work& w, u32 s_base, int warp_row,
                                     const float (&r_out)[kM][kHeadDimV / 8][4],
                                     const OnlineSoftmax<kM>& softmax) {
    const float sink = p.sinks == nullptr ? -infinity() : load_float(p.sinks, w.head, p.sinks_dtype);
    float out_scale[2 * kM], lse[2 * kM];
    float sinks[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) sinks[i] = sink;
    softmax.finish(Variant::exponent(p), sinks, out_scale, lse);
    __syncthreads();  // the other warps may still read K or V where the output goes
    store_accumulator<Element, TileO>(s_base + Smem::kO, warp_row, r_out, out_scale);
    __syncwarp();
    const int rows = w.band.rows - w.m0;
    Element* g_out = static_cast<Element*>(p.out) + w.batch * p.out_stride_b + w.q_row * p.out_stride_s +
                     w.head * p.out_stride_h + w.v_block * kHeadDimV;
    store_rows<TileO, 16 * kM, kAligned>(
        [=](int row) { return g_out + row * p.out_stride_s; }, s_base + Smem::kO, warp_row, rows,
        p.head_dim_v / TileO::kPerChunk - w.v_block * TileO::kChunks, p.aligned != 0);
    if (p.lse != nullptr && w.v_block == 0 && (lane_id() & 3) == 0) {
      float* g_lse = p.lse + w.batch * p.lse_stride_b + w.head * p.lse_stride_h + w.q_row;
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        const int row = warp_row + i / 2 * 16 + (i & 1) * 8 + (lane_id() >> 2);
        if (row < rows) g_lse[row] = lse[i];
      }
    }
  }
};

}  // namespace fm
