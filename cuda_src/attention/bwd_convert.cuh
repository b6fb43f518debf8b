// dq from the sums that backward kernels leave: dq = scale * sum, rounded.
//
// dq_sums (entries, heads, blocks of 64 queries, parts of 64 columns, 8, 128, 4): value (n, thread, e) of a
// part is column 8 n + 2 (thread % 4) + e % 2 of query 16 (thread / 32) + 8 (e / 2) + thread % 32 / 4 of its
// block. Packed sequences are one entry (first_block_of_sums). Overwrites the rows of dq that count.
//
// One warpgroup takes a part of a block.
#pragma once
#include "attention/bwd_params.cuh"
#include "attention/keys.cuh"
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
    AttentionFwdParams f = {};
    f.cu_seqlens_q = f.cu_seqlens_k = p.cu_seqlens_q;
    f.seqused_q = p.seqused_q, f.leftpad_q = p.leftpad_q;
    f.seqlen_q = p.seqlen_q;
    f.lengths = p.lengths;
    const SequenceOf<i64> found = RowKeys::sequence_from(f, batch, block * 64);
    if (block * 64 >= found.seqlen_q) return;
    const i64 piece = (first_block_of_sums(p.lengths, p.cu_seqlens_q, batch, p.heads, p.dq_blocks) +
                       head * p.dq_blocks + block) *
                          p.parts +
                      part;
    const float4* g_sums = reinterpret_cast<const float4*>(p.dq_sums) + piece * 1024;
    float r_dq[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = g_sums[n * 128 + threadIdx.x];
      r_dq[n][0] = x.x, r_dq[n][1] = x.y, r_dq[n][2] = x.z, r_dq[n][3] = x.w;
    }
    const int row = warp_id() * 16;
    Element* g_rows = static_cast<Element*>(p.dq) + batch * p.dq_stride_b +
                      (found.q_row + row) * p.dq_stride_s + head * p.dq_stride_h + part * 64;
    const RowsOut<Element> to = {nullptr,
                                 g_rows,
                                 p.dq_stride_s,
                                 p.dq_stride_h,
                                 found.seqlen_q - block * 64 - row,
                                 p.head_dim - part * 64,
                                 0,
                                 head,
                                 row,
                                 batch,
                                 0};
    const float scale[2] = {p.softmax_scale, p.softmax_scale};
    store_accumulator_directly(to, r_dq, scale);
  }
};

}  // namespace fm
