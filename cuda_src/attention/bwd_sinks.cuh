// The gradient of the sinks: dsinks[h] = - sum over queries of exp(sinks[h] - lse) * delta.
//
// row_lse, row_delta (batch, heads, seqlen), or (heads, total) of packed sequences, as bwd_dot.cuh leaves
// them. Overwrites dsinks (heads,). Sums over the queries that count. The same bits in every run.
//
// One block takes a head; each thread its share of the rows, in order.
#pragma once
#include "attention/bwd_params.cuh"
#include "attention/keys.cuh"
#include "math/softmax.cuh"

namespace fm {

struct AttentionBwdSinks {
  static constexpr int kThreads = 512, kWarps = kThreads / 32;
  struct Smem {
    static constexpr int kBytes = 4 * kWarps;
  };

  FM_DEVICE static void run(const AttentionBwdSinksParams& p) {
    extern __shared__ __align__(16) u8 smem[];
    float* s_sums = reinterpret_cast<float*>(smem);
    const int head = static_cast<int>(blockIdx.x);
    const float sink = load_float(p.sinks, head, p.sinks_dtype);
    AttentionFwdParams f = {};
    f.cu_seqlens_q = f.cu_seqlens_k = p.cu_seqlens_q;
    f.seqused_q = p.seqused_q, f.leftpad_q = p.leftpad_q;
    f.seqlen_q = p.seqlen_q;
    f.lengths = p.lengths;
    const bool packed = p.lengths == kPackedLengths;
    float sum = 0.f;
    for (int batch = 0; batch < p.batch; ++batch) {
      const SequenceOf<i64> found = RowKeys::sequence_from(f, batch, 0);
      const i64 first = found.q_row + (packed ? static_cast<i64>(head) * p.total_q
                                              : (static_cast<i64>(batch) * p.heads_q + head) * p.seqlen_q);
      for (int i = threadIdx.x; i < found.seqlen_q; i += kThreads)
        sum = fmaf(-exp2_approx((sink - p.row_lse[first + i]) * kLog2e), p.row_delta[first + i], sum);
    }
    sum = warp_sum(sum);
    const int warp = warp_id();
    if (lane_id() == 0) s_sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0.f;
    for (int i = 0; i < kWarps; ++i) total += s_sums[i];
    if (p.sinks_dtype == kFP32) {
      static_cast<float*>(p.dsinks)[head] = total;
    } else {
      const u32 half = p.sinks_dtype == kBF16 ? pack2<bf16>(total, 0.f) : pack2<fp16>(total, 0.f);
      static_cast<u16*>(p.dsinks)[head] = static_cast<u16>(half);
    }
  }
};

}  // namespace fm
