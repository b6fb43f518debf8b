// wgmma: products of a warpgroup. A (64 x 16) from shared memory or registers, B (16 x N) from shared memory,
// D (64 x N) in registers: warp w holds rows 16 w .. 16 w + 15 in the layout of mma.sync, so d[j] is the 16 x
// 8 tile of columns 8 j .. 8 j + 7. The products run asynchronously: wgmma_fence before the first,
// wgmma_commit_group after the last, wgmma_wait_group before use.
#pragma once
#include "prelude.cuh"

namespace fm {

// Describes an operand in shared memory, in panels of 128 bytes per row with the 128-byte swizzle; panels
// start at multiples of 1024. K-major (the summed dimension along the rows): one panel holds 64 values of it;
// a step of 16 advances the address by 32 bytes; from eight rows to the next are eight_rows bytes. MN-major
// (the summed dimension across the rows): panels of 64 columns lie panel_bytes apart; a step of 16 advances
// by 16 rows.
FM_DEVICE constexpr u64 wgmma_descriptor(u32 s_address, int panel_bytes, int eight_rows = 1024) {
  constexpr u64 kSwizzle128 = 1;
  return kSwizzle128 << 62 | static_cast<u64>(eight_rows >> 4) << 32 |
         static_cast<u64>(panel_bytes >> 4) << 16 | (s_address >> 4);
}
// In the second block of a cluster an address has the block's rank above these bits, where MN-major operands
// have panel_bytes: what they are described by goes through here.
FM_DEVICE constexpr u32 without_rank(u32 s_address) { return s_address & ((1 << 18) - 1); }
static_assert(wgmma_descriptor(without_rank(0x01000400), 8192) == wgmma_descriptor(0x400, 8192));

// Registers written by ordinary instructions before this may be operands after it.
FM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FM_DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Holds the compiler to the order of the program: no use of d moves across this point.
template <int kN>
FM_DEVICE void wgmma_fence_operand(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// Waits until at most kPending groups are under way; d belonged to one that is then done.
template <int kPending, int kN>
FM_DEVICE void wgmma_wait_group(float (&d)[kN][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  wgmma_fence_operand(d);
}

template <class E, int kN, bool kTransB>
struct Wgmma;

#define FM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FM_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FM_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FM_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FM_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FM_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FM_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FM_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FM_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FM_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FM_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FM_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FM_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FM_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FM_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FM_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FM_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FM_D2(j) FM_D1(j), FM_D1(j + 1)
#define FM_D4(j) FM_D2(j), FM_D2(j + 2)
#define FM_D8(j) FM_D4(j), FM_D4(j + 4)
#define FM_D16(j) FM_D8(j), FM_D8(j + 8)

// One shape: N, its list of accumulator registers in the text, the same list as operands, and the numbers of
// the operands behind them.
#define FM_WGMMA(kType, TYPE, N, REGS, BINDINGS, I0, I1, I2, I3, I4, I5, I6)                                                            \
  template <bool kTransB>                                                                                                               \
  struct Wgmma<kType, N, kTransB> {                                                                                                     \
    /* D = A B + (accumulate ? D : 0), A in shared memory */                                                                            \
    template <bool kTransA = false>                                                                                                     \
    FM_DEVICE static void ss(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) {                                                      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS \
                   "}, %" I0 ", %" I1 ", p, 1, 1, %" I3 ", %" I4 ";\n}\n"                                                                \
                   : BINDINGS                                                                                                           \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransA)), "n"(int(kTransB)));                                            \
    }                                                                                                                                   \
    /* the same with A in registers, in the layout of an mma.sync A operand */                                                          \
    FM_DEVICE static void rs(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, int accumulate) {                                          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS \
                   "}, {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", p, 1, 1, %" I6 ";\n}\n"                                           \
                   : BINDINGS                                                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(kTransB)));                           \
    }                                                                                                                                   \
  };
#define FM_REGS_32 FM_R0 ", " FM_R1
#define FM_REGS_48 FM_REGS_32 ", " FM_R2
#define FM_REGS_64 FM_REGS_48 ", " FM_R3
#define FM_REGS_80 FM_REGS_64 ", " FM_R4
#define FM_REGS_96 FM_REGS_80 ", " FM_R5
#define FM_REGS_112 FM_REGS_96 ", " FM_R6
#define FM_REGS_128 FM_REGS_112 ", " FM_R7
#define FM_REGS_144 FM_REGS_128 ", " FM_R8
#define FM_REGS_160 FM_REGS_144 ", " FM_R9
#define FM_REGS_176 FM_REGS_160 ", " FM_R10
#define FM_REGS_192 FM_REGS_176 ", " FM_R11
#define FM_REGS_256 FM_REGS_192 ", " FM_R12 ", " FM_R13 ", " FM_R14 ", " FM_R15
#define FM_BIND_32 FM_D4(0)
#define FM_BIND_48 FM_D4(0), FM_D2(4)
#define FM_BIND_64 FM_D8(0)
#define FM_BIND_80 FM_D8(0), FM_D2(8)
#define FM_BIND_96 FM_D8(0), FM_D4(8)
#define FM_BIND_112 FM_D8(0), FM_D4(8), FM_D2(12)
#define FM_BIND_128 FM_D16(0)
#define FM_BIND_144 FM_D16(0), FM_D2(16)
#define FM_BIND_160 FM_D16(0), FM_D4(16)
#define FM_BIND_176 FM_D16(0), FM_D4(16), FM_D2(20)
#define FM_BIND_192 FM_D16(0), FM_D8(16)
#define FM_BIND_256 FM_D16(0), FM_D16(16)

FM_WGMMA(bf16, "bf16", 32, FM_REGS_32, FM_BIND_32, "16", "17", "18", "19", "20", "21", "22")
FM_WGMMA(fp16, "f16", 32, FM_REGS_32, FM_BIND_32, "16", "17", "18", "19", "20", "21", "22")
FM_WGMMA(bf16, "bf16", 48, FM_REGS_48, FM_BIND_48, "24", "25", "26", "27", "28", "29", "30")
FM_WGMMA(fp16, "f16", 48, FM_REGS_48, FM_BIND_48, "24", "25", "26", "27", "28", "29", "30")
FM_WGMMA(bf16, "bf16", 64, FM_REGS_64, FM_BIND_64, "32", "33", "34", "35", "36", "37", "38")
FM_WGMMA(fp16, "f16", 64, FM_REGS_64, FM_BIND_64, "32", "33", "34", "35", "36", "37", "38")
FM_WGMMA(bf16, "bf16", 80, FM_REGS_80, FM_BIND_80, "40", "41", "42", "43", "44", "45", "46")
FM_WGMMA(fp16, "f16", 80, FM_REGS_80, FM_BIND_80, "40", "41", "42", "43", "44", "45", "46")
FM_WGMMA(bf16, "bf16", 96, FM_REGS_96, FM_BIND_96, "48", "49", "50", "51", "52", "53", "54")
FM_WGMMA(fp16, "f16", 96, FM_REGS_96, FM_BIND_96, "48", "49", "50", "51", "52", "53", "54")
FM_WGMMA(bf16, "bf16", 112, FM_REGS_112, FM_BIND_112, "56", "57", "58", "59", "60", "61", "62")
FM_WGMMA(fp16, "f16", 112, FM_REGS_112, FM_BIND_112, "56", "57", "58", "59", "60", "61", "62")
FM_WGMMA(bf16, "bf16", 128, FM_REGS_128, FM_BIND_128, "64", "65", "66", "67", "68", "69", "70")
FM_WGMMA(fp16, "f16", 128, FM_REGS_128, FM_BIND_128, "64", "65", "66", "67", "68", "69", "70")
FM_WGMMA(bf16, "bf16", 144, FM_REGS_144, FM_BIND_144, "72", "73", "74", "75", "76", "77", "78")
FM_WGMMA(fp16, "f16", 144, FM_REGS_144, FM_BIND_144, "72", "73", "74", "75", "76", "77", "78")
FM_WGMMA(bf16, "bf16", 160, FM_REGS_160, FM_BIND_160, "80", "81", "82", "83", "84", "85", "86")
FM_WGMMA(fp16, "f16", 160, FM_REGS_160, FM_BIND_160, "80", "81", "82", "83", "84", "85", "86")
FM_WGMMA(bf16, "bf16", 176, FM_REGS_176, FM_BIND_176, "88", "89", "90", "91", "92", "93", "94")
FM_WGMMA(fp16, "f16", 176, FM_REGS_176, FM_BIND_176, "88", "89", "90", "91", "92", "93", "94")
FM_WGMMA(bf16, "bf16", 192, FM_REGS_192, FM_BIND_192, "96", "97", "98", "99", "100", "101", "102")
FM_WGMMA(fp16, "f16", 192, FM_REGS_192, FM_BIND_192, "96", "97", "98", "99", "100", "101", "102")
FM_WGMMA(bf16, "bf16", 256, FM_REGS_256, FM_BIND_256, "128", "129", "130", "131", "132", "133", "134")
FM_WGMMA(fp16, "f16", 256, FM_REGS_256, FM_BIND_256, "128", "129", "130", "131", "132", "133", "134")

}  // namespace fm
