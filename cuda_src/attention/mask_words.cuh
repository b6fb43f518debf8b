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
  static constexpr int kChunks = kBlockN / 16;       // of 16 bytes that a row has in a tile
  static constexpr int kRowsAtOnce = 32 / kChunks;  // that a warp reads
  static constexpr int kPasses = 32 / kRowsAtOnce;
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
    const int index = static_cast<int>(blockIdx.x), m_block = index % p.m_blocks, list = index / p.m_blocks;
    const int batch = list / p.mask_lists, head = list % p.mask_lists << p.pack_bits;

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
      // 32 rows of a tile of keys for each warp in turn.
      const int groups = div_up(rows_of(p, band, m0), 32);
      for (int i = warp_id(); i < tiles * groups; i += kWarps) {
        const u32 bits = read_rows(p, g_mask, g_words, band, m0, i % groups * 32, first + i / groups);
        if (lane_id() == 0 && bits != 0) atomicOr(&s.found[i / groups], bits);
      }
      __syncthreads();
      if (warp_id() == 0) add_entries(s, g_list + 1, first, tiles);
      __syncthreads();
    }
    if (threadIdx.x != 0) return;
    if (s.entries == 0) g_list[1] = begin;
    g_list[0] = max(s.entries, 1);
  }

  // Rows of the mask for a tile of queries: one where all queries share it.
  FM_DEVICE static int rows_of(const Params& p, const BandMask& band, int m0) {
    return p.bias_stride_q == 0 ? 1 : min(kBlockM, band.rows - m0) >> p.pack_bits;
  }

  // By a warp: the words of up to 32 rows from row `begin` on in tile n of keys, and bits of Found. Lanes
  // side by side read a row, so that each load takes whole lines of memory.
  FM_DEVICE static u32 read_rows(const Params& p, const u8* g_mask, u32* g_words, const BandMask& band,
                                 int m0, int begin, int n) {
    const int lane = lane_id(), chunk = lane % kChunks, rows = rows_of(p, band, m0);
    const int col = n * kBlockN + chunk * 16, query = m0 >> p.pack_bits;
    uint4 read[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = min(begin + pass * kRowsAtOnce + lane / kChunks, rows - 1);
      const u8* g_chunk = g_mask + (query + row) * p.bias_stride_q + col * p.bias_stride_k;
      read[pass] = read_chunk(p, g_chunk, band.cols - col);
    }
    u32 found = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = begin + pass * kRowsAtOnce + lane / kChunks;
      const Bits bits = bits_of(read[pass], chunk);
      if (row >= rows) continue;
      if (chunk < 4) g_words[(query + row) * p.mask_stride_q + n * 4 + chunk] = bits.word(chunk);
      const u32 consumers = p.bias_stride_q == 0 ? (1u << kConsumers) - 1 : 1u << ((row << p.pack_bits) / 64);
      found |= (bits.any() ? kAny : 0) | (bits.all() ? 0 : kHidden * consumers);
    }
    return __reduce_or_sync(0xffffffffu, found);
  }

  // 16 bytes of a row, of which `keys` exist; the others are 0.
  FM_DEVICE static uint4 read_chunk(const Params& p, const u8* g_chunk, int keys) {
    if (p.bias_stride_k == 1 && keys >= 16 && reinterpret_cast<u64>(g_chunk) % 16 == 0)
      return __ldg(reinterpret_cast<const uint4*>(g_chunk));
    u32 quads[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i < keys) quads[i / 4] |= g_chunk[i * p.bias_stride_k] << i % 4 * 8;
    return make_uint4(quads[0], quads[1], quads[2], quads[3]);
  }

  // The bits of a row. Byte j of half[i][h]: keys 8 n + 4 i + j of the tile, n from 8 h on, which are word
  // 2 i + j / 2.
  struct Bits {
    u32 half[2][2];
    FM_DEVICE u32 word(int t) const {
      const u32 low = half[t / 2][0], high = half[t / 2][1];
      return __byte_perm(low, high, t % 2 == 0 ? 0x5140 : 0x7362);
    }
    FM_DEVICE bool any() const { return (half[0][0] | half[0][1] | half[1][0] | half[1][1]) != 0; }
    FM_DEVICE bool all() const {
      const u32 both = kChunks == 8 ? half[0][1] & half[1][1] : ~0u;
      return (half[0][0] & half[1][0] & both) == ~0u;
    }
  };
  // By all lanes of a row, each with its 16 bytes: two rows of eight keys.
  FM_DEVICE static Bits bits_of(const uint4& bytes, int chunk) {
    const int n = chunk % 4 * 2;
    u32 mine[2] = {not_zero(bytes.x) >> (7 - n) | not_zero(bytes.z) >> (6 - n),
                   not_zero(bytes.y) >> (7 - n) | not_zero(bytes.w) >> (6 - n)};
    Bits bits;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mine[i] |= __shfl_xor_sync(0xffffffffu, mine[i], 1);
      mine[i] |= __shfl_xor_sync(0xffffffffu, mine[i], 2);
      const u32 other = kChunks == 8 ? __shfl_xor_sync(0xffffffffu, mine[i], 4) : 0;
      bits.half[i][0] = chunk < 4 ? mine[i] : other;
      bits.half[i][1] = chunk < 4 ? other : mine[i];
    }
    return bits;
  }
  // The highest bit of each byte that is not 0.
  FM_DEVICE static u32 not_zero(u32 bytes) {
    return ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu | bytes) & 0x80808080u;
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
