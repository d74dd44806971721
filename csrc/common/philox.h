// The package's one random stream: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), counter based, so any kernel can regenerate any element's draw and no mask is ever stored.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LWFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline: this code is shared by the instruction set levels, and no level's copy of it may be the one that the
// linker keeps for all (see cpu/vec.h).
#define LWFT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace lwft {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

LWFT_HOST_DEVICE PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                           uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Where the draw of the element (row, col) stands in the stream. 64 neighbouring columns share 16 counters: column c
// takes word (c % 64) / 16 of counter (c / 64) * 16 + c % 16, so 16 vector lanes yield 64 draws with no shuffle, and
// the columns c, c + 16, c + 32, c + 48 of one CUDA thread come from a single call.
constexpr int64_t kPhiloxColumns = 64, kPhiloxLanes = 16;

LWFT_HOST_DEVICE uint32_t philox_draw(uint64_t seed, uint64_t offset, int64_t row, int64_t col) {
  const PhiloxWords words =
      philox4x32_10(static_cast<uint32_t>(col / kPhiloxColumns * kPhiloxLanes + col % kPhiloxLanes),
                    static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                    static_cast<uint32_t>(offset), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  // by comparison: an index known only at run time would put the words into a GPU thread's local memory
  const int64_t word = col % kPhiloxColumns / kPhiloxLanes;
  return word == 0 ? words.word[0] : word == 1 ? words.word[1] : word == 2 ? words.word[2] : words.word[3];
}

}  // namespace lwft
