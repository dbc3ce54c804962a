// A linear layer whose weights have 4, 6 or 8 bits, in whole numbers, on a CPU. linear.py compiles
// it.
//
//     W = (codes - 8) * scale + zero    4 and 8 bits: both for each group of 32 weights of a row
//     W = (codes - 32) * scale          6 bits: a scale for each half of a group
//     x = codes * scale                 a scale for each group of 32 numbers of a row of x
//
// What a group adds to an output is a sum of products of bytes, which is exact, times both scales,
// and its zero times the sum of x. Groups are added in float32, in their order. So a row of y
// depends on its own row of x alone, bit for bit, however many rows there are.
//
// Shape letters: M rows of x, K inputs, N outputs, G = K / 32 groups. A block is 16 outputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

constexpr int GROUP = 32, BLOCK = 16;
#if defined(__AVX512VNNI__)
constexpr int WIDTH = 64;  // bytes of a vector
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
#error "needs AVX2"
#endif
constexpr int LANES = WIDTH / 4;        // outputs that are computed at a time
constexpr int PARTS = BLOCK / LANES;    // of a block
constexpr int64_t AT_ONCE = WIDTH / 8;  // rows whose sums are held in registers
constexpr int64_t IN_CACHE = 64;        // rows whose numbers all stay in the cache
constexpr float TINY = 1e-30f;          // groups of x below it are zero: 127 / TINY is finite

typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));  // 4 codes of each output
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef float Floats __attribute__((vector_size(WIDTH)));

struct Group {  // of a row of x
  int8_t codes[GROUP];
  int32_t least[2];  // -32 times the sum of each half's codes
  float scale, sum;  // sum: of the numbers that the codes stand for
};

// Four codes of each output, of those that these vectors hold (see pack).
template <int BITS>
static inline Bytes unpack(const Bytes* packed, int four) {
  if (BITS == 8) return *packed;
  if (BITS == 4) return four ? *packed >> 4 : *packed & 15;
  if (four < 3) return packed[four] & 63;
  const auto upper = [&](int i, int places) { return (Bytes)((Ints)packed[i] >> places); };
  return (upper(0, 6) & 3) | (upper(1, 4) & 12) | (upper(2, 2) & 48);
}

// total + the sum, for each output, of its 4 codes times the 4 bytes of x.
template <int BITS>
static inline Ints multiply_add(Ints total, Bytes codes, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, _mm512_set1_epi32(four));
#else
  // Sums of two products have 16 bits here, too few for codes of 8: each half of a code by itself.
  const __m256i fours = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
  __m256i pairs = _mm256_maddubs_epi16((__m256i)(BITS == 8 ? codes & 15 : codes), fours);
  total += (Ints)_mm256_madd_epi16(pairs, one);
  if (BITS == 8) {
    pairs = _mm256_maddubs_epi16((__m256i)(codes >> 4), fours);
    total += (Ints)_mm256_madd_epi16(pairs, _mm256_slli_epi16(one, 4));
  }
  return total;
#endif
}

static inline Floats as_floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

// The nearest codes of -127..127, in steps of a 127th of the largest number. NaN stays NaN.
static Group quantise(const float* x) {
  constexpr int VECTORS = GROUP / LANES;
  typedef int8_t Codes __attribute__((vector_size(LANES)));
  Group group;
  Floats numbers[VECTORS], largest = {}, nan = {};
  memcpy(numbers, x, sizeof(numbers));
  for (const Floats& some : numbers) {
    const Floats sizes = some < 0 ? -some : some;
    largest = sizes > largest ? sizes : largest;
    nan += some * 0;
  }
  float most = 0, none = 0;
  for (int i = 0; i < LANES; i++) {
    most = std::max(most, largest[i]);
    none += nan[i];
  }
  const float per = most > TINY ? 127 / most : 0;
  int32_t sums[2] = {};
  for (int v = 0; v < VECTORS; v++) {
    // Beside this number a float32 has no room for fractions: they are rounded.
    const Floats whole = (numbers[v] * per + 0x1.8p23f) - 0x1.8p23f;
    const Ints codes = __builtin_convertvector(whole, Ints);
    const Codes bytes = __builtin_convertvector(codes, Codes);
    memcpy(group.codes + v * LANES, &bytes, LANES);
    for (int i = 0; i < LANES; i++) sums[v * 2 / VECTORS] += codes[i];
  }
  group.scale = most / 127 + none;
  group.sum = group.scale * (sums[0] + sums[1]);
  for (int half = 0; half < 2; half++) group.least[half] = -32 * sums[half];
  return group;
}

// y of LANES outputs of a block and R rows. x: G * R groups, those of one place side by side.
template <int BITS, int R>
static void multiply_block(const uint8_t* packed, const Group* x, int64_t G, Floats* y) {
  constexpr int VECTORS = BITS == 6 ? 3 : 1, FOURS = BITS == 6 ? 4 : 8 / BITS;
  Floats out[R] = {};
  for (int64_t g = 0; g < G; g++, x += R) {
    Ints total[2][R] = {};  // of each half, or of both
    for (int k = 0; k < GROUP;) {
      auto& sum = total[BITS == 6 ? k / 16 : 0];
      Bytes some[VECTORS];
      for (Bytes& vector : some) {
        memcpy(&vector, packed, WIDTH);
        packed += 64;
      }
      for (int four = 0; four < FOURS; four++, k += 4) {
        const Bytes codes = unpack<BITS>(some, four);
        for (int r = 0; r < R; r++) sum[r] = multiply_add<BITS>(sum[r], codes, x[r].codes + k);
      }
    }
    // Read after the codes, as it lies: read first, it cost a fifth of the speed (LOG.md).
    Ints pairs;  // of each output; the upper half of a float32 is a bfloat16
    memcpy(&pairs, packed, WIDTH);
    packed += 64;
    const Floats first = (Floats)(pairs << 16), second = (Floats)(pairs & ~0xffff);
    const Floats least = second - 8 * first;
    for (int r = 0; r < R; r++) {
      if (BITS == 6) {
        const Floats sum = as_floats(total[0][r] + x[r].least[0]) * first;
        out[r] += (sum + as_floats(total[1][r] + x[r].least[1]) * second) * x[r].scale;
      } else {
        out[r] += as_floats(total[0][r]) * x[r].scale * first;
        out[r] += least * x[r].sum;
      }
    }
  }
  memcpy(y, out, sizeof(out));
}

// x (M, K) float32 -> y (M, N) float32.
template <int BITS>
static void multiply(
    const uint8_t* packed, const float* x, float* y, int64_t M, int64_t K, int64_t N) {
  const int64_t G = K / GROUP, step = G * (GROUP * BITS / 8 * BLOCK + 64);
  using Kernel = void (*)(const uint8_t*, const Group*, int64_t, Floats*);
  static constexpr Kernel kernels[] = {
      multiply_block<BITS, 1>, multiply_block<BITS, 2>, multiply_block<BITS, 3>,
      multiply_block<BITS, 4>, multiply_block<BITS, 5>, multiply_block<BITS, 6>,
      multiply_block<BITS, 7>, multiply_block<BITS, 8>};
  std::vector<Group> groups(M * G);
  for (int64_t m = 0; m < M; m++) {
    const int64_t first = m / AT_ONCE * AT_ONCE, R = std::min(AT_ONCE, M - first);
    for (int64_t g = 0; g < G; g++)
      groups[first * G + g * R + m - first] = quantise(x + m * K + g * GROUP);
  }
  torch::stable::parallel_for(0, (N + LANES - 1) / LANES, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      for (int64_t first = 0; first < M; first += AT_ONCE) {
        const int64_t R = std::min(AT_ONCE, M - first);
        Floats out[AT_ONCE];
        const uint8_t* weights = packed + n / PARTS * step + n % PARTS * WIDTH;
        kernels[R - 1](weights, &groups[first * G], G, out);
        const int64_t outputs = std::min<int64_t>(LANES, N - n * LANES);
        for (int64_t r = 0; r < R; r++)
          memcpy(y + (first + r) * N + n * LANES, &out[r], outputs * sizeof(float));
      }
    }
  });
}

// codes (N, K) bytes, pairs (N, G, 2) bfloat16 -> packed (blocks, G, bytes of a group). A pair is
// scale and zero, or with 6 bits the scales of both halves.
//
// A group's bytes are 4 codes of each output, the next 4, and so on, then the pair of each. With 4
// bits a byte holds two codes: one, and the one that is 4 places later. With 6 bits the first three
// fours of a half are followed, in the upper 2 bits of their bytes, by those of the last four.
static Tensor pack(Tensor codes_NK, Tensor pairs_NG2, int64_t bits) {
  const int64_t N = codes_NK.size(0), G = pairs_NG2.size(1), blocks = (N + BLOCK - 1) / BLOCK;
  const int64_t codes_bytes = GROUP * bits / 8 * BLOCK, bytes = codes_bytes + 4 * BLOCK;
  Tensor packed = torch::stable::new_zeros(codes_NK, {blocks, G, bytes});
  const auto* codes = static_cast<const uint8_t*>(codes_NK.const_data_ptr());
  const auto* pair = static_cast<const uint32_t*>(pairs_NG2.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  for (int64_t n = 0; n < N; n++) {
    for (int64_t g = 0; g < G; g++, pair++) {
      uint8_t* first = out + (n / BLOCK * G + g) * bytes + n % BLOCK * 4;
      for (int k = 0; k < GROUP; k++, codes++) {
        const int four = k / 4 % 4, vector = bits == 6 ? k / 16 * 3 : k * bits / 32;
        uint8_t* byte = first + vector * 64 + k % 4;
        if (bits == 8) *byte = *codes;
        else if (bits == 4) *byte |= *codes << four % 2 * 4;
        else if (four < 3) byte[four * 64] |= *codes;
        else for (int i = 0; i < 3; i++) byte[i * 64] |= (*codes >> 2 * i & 3) << 6;
      }
      memcpy(first + codes_bytes, pair, 4);
    }
  }
  return packed;
}

static Tensor linear(Tensor x_MK, Tensor packed, int64_t bits, int64_t N) {
  const int64_t M = x_MK.size(0), K = x_MK.size(1);
  Tensor y_MN = torch::stable::new_empty(x_MK, {M, N});
  const auto* weights = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* x = static_cast<const float*>(x_MK.const_data_ptr());
  auto* y = static_cast<float*>(y_MN.mutable_data_ptr());
  for (int64_t first = 0; first < M; first += IN_CACHE) {
    const int64_t rows = std::min(IN_CACHE, M - first);
    const auto product = bits == 4 ? multiply<4> : bits == 6 ? multiply<6> : multiply<8>;
    product(weights, x + first * K, y + first * N, rows, K, N);
  }
  return y_MN;
}

STABLE_TORCH_LIBRARY(few_bits, library) {
  library.def("pack(Tensor codes, Tensor pairs, int bits) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int bits, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(few_bits, CPU, library) {
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("linear", TORCH_BOX(&linear));
}
