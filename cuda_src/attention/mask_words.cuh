// A boolean mask made ready for the Hopper kernel, in one pass over it:
//
//   words   4 of 32 bits for each row and tile of keys: what the 4 threads that hold the row's scores need.
//           Word t, bit n: key 8 n + 2 t of the tile; bit 16 + n: key 8 n + 2 t + 1. 1: attend.
//   lists   for each tile of queries, the tiles of keys that the mask and the band leave, rising, each with
//           bits that say for which consumers it hides none (key_tiles.cuh). A tile of queries that sees no
//           key has one entry, whose scores are all masked.
//
// The mask is p.bias as bytes, of which 0 hides: (batch, heads, seqlen_q, seqlen_k) with any strides, 0 along
// axes that it is spread over. Rows and tiles are counted from the first query and key that count.
//
// One block makes the list of one tile of queries, and the words of its rows. Where rows are the same for
// several blocks, all write the same words. Params are those of the kernel that reads them.
#pragma once
#include "attention/key_tiles.cuh"
#include "attention/keys.cuh"
#include "tile/mask.cuh"

namespace fm {

template <int kBlockM_, int kBlockN_>
struct AttentionMaskWords {
  using Params = AttentionFwdSm90Params;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kConsumers = kBlockM / 64;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kPerLane = kBlockN / 32;  // bytes of a row that a lane reads
  using Bytes = decltype(pick<kPerLane == 4>(u32(), u16()));
  static constexpr int kAtOnce = 8;              // rows that a warp reads before it uses the first
  static_assert(kBlockN == 64 || kBlockN == 128, "a word has bits for 16 blocks of 8 keys");

  // Of a tile of keys: it shows a score; kHidden << i: it hides one from consumer i.
  enum Found : u32 { kAny = 1, kHidden = 2 };
  struct Smem {
    enum { kBytes = 256 };
    u32 found[32];  // of each tile of a round
    int entries;    // of the list so far
  };
  static_assert(sizeof(Smem) <= Smem::kBytes);

  FM_DEVICE static void run(const Params& p) {
    extern __shared__ __align__(16) u8 smem[];
    Smem& s = *reinterpret_cast<Smem*>(smem);
    int index = static_cast<int>(blockIdx.x);
    const int m_block = index % p.m_blocks;
    index /= p.m_blocks;
    const int list = index % p.mask_lists, batch = index / p.mask_lists, head = list << p.pack_bits;

    const Sequence found = without_unseeing(p, DenseKeys::sequence(p, batch));
    const BandMask band = {found.seqlen_q << p.pack_bits, found.seqlen_k, found.seqlen_k - found.seqlen_q,
                           p.window_left,                 p.window_right, p.pack_bits};
    const int m0 = m_block * kBlockM;
    if (m0 >= band.rows) return;
    const int end = max(1, div_up(band.last(min(m0 + kBlockM, band.rows) - 1) + 1, kBlockN));
    const int begin = min(band.first(m0) / kBlockN, end - 1);
    int* g_list = p.mask_tiles + list_of_tiles(p, batch, head, m_block);
    const u8* g_mask = static_cast<const u8*>(p.bias) + batch * p.bias_stride_b + head * p.bias_stride_h +
                       found.q_row * p.bias_stride_q + found.k_row * p.bias_stride_k;
    u32* g_words = p.mask_words + batch * p.mask_stride_b + head * p.mask_stride_h;

    if (threadIdx.x == 0) s.entries = 0;
    for (int first = begin; first < end; first += 32) {
      const int tiles = min(32, end - first);
      if (threadIdx.x < 32) s.found[threadIdx.x] = 0;
      __syncthreads();
      // The warps share the rows of each tile, or the tiles where all rows are one.
      const bool one_row = p.bias_stride_q == 0;
      for (int tile = one_row ? warp_id() : 0; tile < tiles; tile += one_row ? kWarps : 1) {
        const u32 bits = read_tile(p, g_mask, g_words, band, m0, first + tile);
        if (lane_id() == 0 && bits != 0) atomicOr(&s.found[tile], bits);
      }
      __syncthreads();
      if (warp_id() == 0) add_entries(s, g_list + 1, first, tiles);
      __syncthreads();
    }
    if (threadIdx.x != 0) return;
    if (s.entries == 0) g_list[1] = begin;
    g_list[0] = max(s.entries, 1);
  }

  // The rows of one warp: their words, and bits of Found. Where all rows are one, that one. Several rows are
  // read before the first is used, for the memory's time passes once for them all.
  FM_DEVICE static u32 read_tile(const Params& p, const u8* g_mask, u32* g_words, const BandMask& band,
                                 int m0, int n) {
    const int lane = lane_id(), col = n * kBlockN + lane * kPerLane;
    const int first = m0 >> p.pack_bits;
    const bool one_row = p.bias_stride_q == 0;
    const int rows = one_row ? 1 : min(kBlockM, band.rows - m0) >> p.pack_bits;
    const u8* g_first = g_mask + first * p.bias_stride_q + col * p.bias_stride_k;
    const bool together = p.bias_stride_k == 1 && p.bias_stride_q % kPerLane == 0 &&
                          (n + 1) * kBlockN <= band.cols && reinterpret_cast<u64>(g_first) % kPerLane == 0;
    u32 bits = 0;
    for (int begin = one_row ? 0 : warp_id(); begin < rows; begin += kAtOnce * kWarps) {
      u32 read[kAtOnce];
      if (together) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          read[i] = *reinterpret_cast<const Bytes*>(g_first + row_at(begin, i, rows) * p.bias_stride_q);
      } else {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const u8* g_row = g_first + row_at(begin, i, rows) * p.bias_stride_q;
          read[i] = 0;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j)
            if (col + j < band.cols) read[i] |= g_row[j * p.bias_stride_k] << 8 * j;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = begin + i * kWarps;
        if (row >= rows) break;
        const u32 mine = bits_of(read[i]), word = word_of(mine);
        if (lane < 4) g_words[(first + row) * p.mask_stride_q + n * 4 + lane] = word;
        const bool any = __any_sync(0xffffffffu, mine != 0);
        const bool all = __all_sync(0xffffffffu, mine == (1u << kPerLane) - 1);
        const u32 consumers = one_row ? (1u << kConsumers) - 1 : 1u << ((row << p.pack_bits) / 64);
        bits |= (any ? kAny : 0) | (all ? 0 : kHidden * consumers);
      }
    }
    return bits;
  }

  // The i-th row of a round, or the last one again where there are no more.
  FM_DEVICE static int row_at(int begin, int i, int rows) { return min(begin + i * kWarps, rows - 1); }

  // Bit j: byte j is not 0.
  FM_DEVICE static u32 bits_of(u32 bytes) {
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) bits |= (bytes >> 8 * j & 0xff) != 0 ? 1u << j : 0;
    return bits;
  }

  // The bits of all lanes as words: lane t gets word t. Pairs of keys take turns among the words.
  FM_DEVICE static u32 word_of(u32 mine) {
    const int t = lane_id() & 3;
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (kPerLane == 4) {
        // A lane holds two pairs: of words 0 and 1, or 2 and 3.
        const u32 low = __ballot_sync(0xffffffffu, mine >> e & 1);
        const u32 high = __ballot_sync(0xffffffffu, mine >> (2 + e) & 1);
        word |= every_other((t & 1 ? high : low) >> (t >> 1)) << 16 * e;
      } else {
        // Lane l holds the pair of word l % 4.
        const u32 pairs = __ballot_sync(0xffffffffu, mine >> e & 1);
        word |= every_other(every_other(pairs >> t)) << 16 * e;
      }
    }
    return word;
  }

  // Bits 0, 2, 4, ... side by side.
  FM_DEVICE static u32 every_other(u32 x) {
    x &= 0x55555555u;
    x = (x | x >> 1) & 0x33333333u;
    x = (x | x >> 2) & 0x0f0f0f0fu;
    x = (x | x >> 4) & 0x00ff00ffu;
    return (x | x >> 8) & 0x0000ffffu;
  }

  // By a whole warp: a lane looks at one tile.
  FM_DEVICE static void add_entries(Smem& s, int* g_entries, int first, int tiles) {
    const int lane = lane_id();
    const u32 found = lane < tiles ? s.found[lane] : 0;
    const u32 shown = __ballot_sync(0xffffffffu, (found & kAny) != 0);
    const int before = s.entries + __popc(shown & ((1u << lane) - 1));
    const u32 whole = ~(found / kHidden) & ((1u << kConsumers) - 1);
    if (found & kAny) g_entries[before] = (first + lane) | static_cast<int>(whole << kTileBits);
    __syncwarp();
    if (lane == 0) s.entries += __popc(shown);
    __syncwarp();
  }
};

}  // namespace fm
