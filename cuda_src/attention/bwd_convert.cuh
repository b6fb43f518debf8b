// dq from the sums that the Hopper backward kernel leaves: dq = scale * sum, rounded.
//
// dq_sums (batch, heads, blocks of 64 queries, parts of 64 columns, 8, 128, 4): value (n, thread, e) of a
// part is column 8 n + 2 (thread % 4) + e % 2 of query 16 (thread / 32) + 8 (e / 2) + thread % 32 / 4 of its
// block. Overwrites the rows of dq.
//
// One warpgroup takes a part of a block.
#pragma once
#include "attention/bwd_params.cuh"
#include "tile/epilogue.cuh"

namespace fm {

template <class Element_>
struct AttentionBwdConvert {
  using Element = Element_;
  static constexpr int kThreads = 128;
  struct Smem {
    static constexpr int kBytes = 0;
  };

  FM_DEVICE static void run(const AttentionBwdConvertParams& p) {
    int index = static_cast<int>(blockIdx.x);
    const int part = index % p.parts;
    index /= p.parts;
    const int block = index % p.blocks, head = index / p.blocks % p.heads, batch = index / p.blocks / p.heads;
    const float4* g_sums = reinterpret_cast<const float4*>(p.dq_sums) + static_cast<i64>(blockIdx.x) * 1024;
    float r_dq[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = g_sums[n * 128 + threadIdx.x];
      r_dq[n][0] = x.x, r_dq[n][1] = x.y, r_dq[n][2] = x.z, r_dq[n][3] = x.w;
    }
    const int row = block * 64 + warp_id() * 16;
    Element* g_rows = static_cast<Element*>(p.dq) + batch * p.dq_stride_b + row * p.dq_stride_s +
                      head * p.dq_stride_h + part * 64;
    const RowsOut<Element> to = {
        nullptr, g_rows, p.dq_stride_s, p.dq_stride_h, p.seqlen_q - row, p.head_dim - part * 64, 0, head, row,
        batch,   0};
    const float scale[2] = {p.softmax_scale, p.softmax_scale};
    store_accumulator_directly(to, r_dq, scale);
  }
};

}  // namespace fm
