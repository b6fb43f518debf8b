// Products of one warp on mma.sync. A step is a slice of 32 bytes of the summed dimension: 16 values of 16
// bits, or 8 of fp32. fp32 runs as three tf32 products (hi*hi + hi*lo + lo*hi), which keeps about 21 bits of
// each factor.
#pragma once
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sync.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/smem.cuh"

namespace fm {

template <class E>
struct Step {
  static constexpr int kDepth = 16;
  struct A {
    u32 r[4];
    FM_DEVICE void set(const u32 (&raw)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = raw[i];
    }
  };
  FM_DEVICE static void mma(float (&d)[4], const A& a, u32 b0, u32 b1) {
    if constexpr (is_same<E, bf16>) {
      mma_sync_m16n8k16_bf16(d, a.r, b0, b1);
    } else {
      mma_sync_m16n8k16_fp16(d, a.r, b0, b1);
    }
  }
};

template <>
struct Step<fp32> {
  static constexpr int kDepth = 8;
  struct A {
    u32 hi[4], lo[4];
    FM_DEVICE void set(const u32 (&raw)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) split(raw[i], hi[i], lo[i]);
    }
  };
  FM_DEVICE static void split(u32 raw, u32& hi, u32& lo) {
    hi = cvt_rna_tf32(__uint_as_float(raw));
    lo = cvt_rna_tf32(__uint_as_float(raw) - __uint_as_float(hi));
  }
  FM_DEVICE static void mma(float (&d)[4], const A& a, u32 b0, u32 b1) {
    u32 b0_hi, b0_lo, b1_hi, b1_lo;
    split(b0, b0_hi, b0_lo);
    split(b1, b1_hi, b1_lo);
    mma_sync_m16n8k8_tf32(d, a.lo, b0_hi, b1_hi);
    mma_sync_m16n8k8_tf32(d, a.hi, b0_lo, b1_lo);
    mma_sync_m16n8k8_tf32(d, a.hi, b0_hi, b1_hi);
  }
};

// D(16 kM x 8 kTiles) += A * B^T: A rows from `a_row` of tile TA, B rows from s_b on of tile TB; both hold
// the summed dimension along their rows. D is the tiles from kFirst on of d.
template <class E, class TA, class TB, int kFirst, int kTiles, int kM, int kN>
FM_DEVICE void gemm_ss_nt_onto(float (&d)[kM][kN][4], u32 s_a, int a_row, u32 s_b) {
  const int lane = lane_id();
  // Rows advance by 16 (A) and 16 (B), whole swizzle periods: the swizzle of a lane's row never changes.
  const int row_a = a_row + (lane & 15), half_a = lane >> 4;
  const int row_b = (lane & 7) + (lane >> 4 << 3), half_b = lane >> 3 & 1;
#pragma unroll
  for (int k = 0; k < TA::kChunks / 2; ++k) {
    typename Step<E>::A a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      u32 raw[4];
      ldmatrix_x4(raw, s_a + TA::offset(row_a, 2 * k + half_a) + m * 16 * TA::kRowBytes);
      a[m].set(raw);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      u32 b[4];
      ldmatrix_x4(b, s_b + TB::offset(row_b, 2 * k + half_b) + n * 8 * TB::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Step<E>::mma(d[m][kFirst + n], a[m], b[0], b[1]);
        Step<E>::mma(d[m][kFirst + n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// D = A * B^T
template <class E, class TA, class TB, int kM, int kN>
FM_DEVICE void gemm_ss_nt(float (&d)[kM][kN][4], u32 s_a, int a_row, u32 s_b) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0.f;
  gemm_ss_nt_onto<E, TA, TB, 0, kN>(d, s_a, a_row, s_b);
}

// D += A * B^T as one of many steps, on the kTiles tiles from kFirst on. The tensor core truncates when it
// adds, so fp32 sums each step apart and adds it with rounding.
template <class E, class TA, class TB, int kFirst, int kTiles, int kM, int kN>
FM_DEVICE void gemm_ss_nt_step(float (&d)[kM][kN][4], u32 s_a, int a_row, u32 s_b) {
  if constexpr (sizeof(E) == 4) {
    float sum[kM][kTiles][4];
    gemm_ss_nt<E, TA, TB>(sum, s_a, a_row, s_b);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][kFirst + n][i] += sum[m][n][i];
  } else {
    gemm_ss_nt_onto<E, TA, TB, kFirst, kTiles>(d, s_a, a_row, s_b);
  }
}

// D(16 kM x 8 kND) += P * B: P is an accumulator of an earlier product, B the rows of tile TB, the summed
// dimension across its rows.
template <class E, class TB, int kM, int kN, int kND>
FM_DEVICE void gemm_rs_nn(float (&d)[kM][kND][4], const float (&p)[kM][kN][4], u32 s_b) {
  const int lane = lane_id();
  if constexpr (sizeof(E) == 2) {
    const int row_b = lane & 15, half_b = lane >> 4;
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
      // An accumulator pair of two neighbouring 16x8 tiles is, value for value, one 16x16 A operand.
      typename Step<E>::A a[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const u32 raw[4] = {pack2<E>(p[m][2 * k][0], p[m][2 * k][1]),
                            pack2<E>(p[m][2 * k][2], p[m][2 * k][3]),
                            pack2<E>(p[m][2 * k + 1][0], p[m][2 * k + 1][1]),
                            pack2<E>(p[m][2 * k + 1][2], p[m][2 * k + 1][3])};
        a[m].set(raw);
      }
#pragma unroll
      for (int n = 0; n < kND; n += 2) {
        u32 b[4];
        ldmatrix_x4_trans(b, s_b + TB::offset(row_b, n + half_b) + k * 16 * TB::kRowBytes);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Step<E>::mma(d[m][n], a[m], b[0], b[1]);
          Step<E>::mma(d[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    // Summed index t of the mma stands for row 2t, t + 4 for row 2t + 1: then the accumulator is the A
    // operand without a shuffle. The tensor core truncates when it adds, so a long sum would drift: each tile
    // is summed apart and added by an FADD, which rounds.
    const int g = lane >> 2, t = lane & 3;
    typename Step<E>::A a[kM][kN];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const u32 raw[4] = {__float_as_uint(p[m][k][0]), __float_as_uint(p[m][k][2]),
                            __float_as_uint(p[m][k][1]), __float_as_uint(p[m][k][3])};
        a[m][k].set(raw);
      }
#pragma unroll
    for (int n = 0; n < kND; ++n) {
      float sum[kM][4] = {};
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        u32 b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          b[i] = ld_shared_b32(s_b + TB::offset(k * 8 + 2 * t + i, 2 * n + (g >> 2)) + (g & 3) * 4);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) Step<E>::mma(sum[m], a[m][k], b[0], b[1]);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] += sum[m][i];
    }
  }
}

// D(16 kM x 8 kN) += A B over 16 values of the summed dimension: A in registers, B 16 rows of tile TB from s_b
// on, columns from 16-byte chunk `chunk` on. 16-bit values.
template <class E, class TB, int kM, int kN>
FM_DEVICE void gemm_rs_nn_step(float (&d)[kM][kN][4], const typename Step<E>::A (&a)[kM], u32 s_b, int chunk) {
  static_assert(sizeof(E) == 2 && kN % 2 == 0);
  const int row = lane_id() & 15, half = lane_id() >> 4;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    u32 b[4];
    ldmatrix_x4_trans(b, s_b + TB::offset(row, chunk + n + half));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Step<E>::mma(d[m][n], a[m], b[0], b[1]);
      Step<E>::mma(d[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// D(16 kM x 8 kN) += A B: A rows from `a_row` of tile TA, which hold the summed dimension along them, all of
// it; B the rows of tile TB, columns from 16-byte chunk b_chunk on. 16-bit values.
template <class E, class TA, class TB, int kM, int kN>
FM_DEVICE void gemm_ss_nn(float (&d)[kM][kN][4], u32 s_a, int a_row, u32 s_b, int b_chunk) {
  static_assert(TA::kCols == TB::kRows);
  const int lane = lane_id();
  const int row_a = a_row + (lane & 15), half_a = lane >> 4;
#pragma unroll
  for (int k = 0; k < TB::kRows / 16; ++k) {
    typename Step<E>::A a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      u32 raw[4];
      ldmatrix_x4(raw, s_a + TA::offset(row_a, 2 * k + half_a) + m * 16 * TA::kRowBytes);
      a[m].set(raw);
    }
    gemm_rs_nn_step<E, TB>(d, a, s_b + k * 16 * TB::kRowBytes, b_chunk);
  }
}

// D(16 kM x 8 kN) += A^T B: both hold the summed dimension across their rows. Columns from 16-byte chunk
// a_chunk on of tile TA, b_chunk on of tile TB. 16-bit values.
template <class E, class TA, class TB, int kM, int kN>
FM_DEVICE void gemm_ss_tn(float (&d)[kM][kN][4], u32 s_a, int a_chunk, u32 s_b, int b_chunk) {
  static_assert(TA::kRows == TB::kRows);
  const int lane = lane_id();
  const int row_a = (lane & 7) + (lane >> 4) * 8, half_a = lane >> 3 & 1;
#pragma unroll
  for (int k = 0; k < TA::kRows / 16; ++k) {
    typename Step<E>::A a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      u32 raw[4];
      ldmatrix_x4_trans(raw, s_a + TA::offset(row_a, a_chunk + 2 * m + half_a) + k * 16 * TA::kRowBytes);
      a[m].set(raw);
    }
    gemm_rs_nn_step<E, TB>(d, a, s_b + k * 16 * TB::kRowBytes, b_chunk);
  }
}

// Whether some row of the warp has a factor other than 1: late in a row the maximum seldom moves.
template <int kRows>
FM_DEVICE bool any_differs(const float (&row_scale)[kRows]) {
  bool differs = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) differs |= row_scale[i] != 1.f;
  return __any_sync(0xffffffffu, differs);
}

template <int kM, int kN>
FM_DEVICE void scale_rows(float (&d)[kM][kN][4], const float (&row_scale)[2 * kM]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] *= row_scale[2 * m + i / 2];
}

// An accumulator, scaled per row, to rows `row` .. and columns `col` .. (a multiple of 8) of tile T as
// elements of type E; of d the kTiles tiles from kFirst on, or all.
template <class E, class T, int kFirst = 0, int kTiles = 0, int kM, int kN>
FM_DEVICE void store_accumulator(u32 s_base, int row, const float (&d)[kM][kN][4],
                                 const float (&row_scale)[2 * kM], int col = 0) {
  constexpr int kUsed = kTiles == 0 ? kN : kTiles;
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int r = row + i / 2 * 16 + (i & 1) * 8 + g;
#pragma unroll
    for (int n = 0; n < kUsed; ++n) {
      const float x = d[i / 2][kFirst + n][(i & 1) * 2] * row_scale[i];
      const float y = d[i / 2][kFirst + n][(i & 1) * 2 + 1] * row_scale[i];
      if constexpr (sizeof(E) == 2) {
        st_shared_b32(s_base + T::offset(r, col / 8 + n) + t * 4, pack2<E>(x, y));
      } else {
        st_shared_v2_f32(s_base + T::offset(r, col / 4 + 2 * n + (t >> 1)) + (t & 1) * 8, x, y);
      }
    }
  }
}

}  // namespace fm
