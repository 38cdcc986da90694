// Vectors of the instruction set that a file is compiled for: GCC's and Clang's vector extensions, and the few operations that
// these have no words for. Included inside of the target region of each passes_*.cpp.
//
// Sums run in sixteen lanes whatever a vector holds, and every operation is rounded by itself and correctly, so that all
// instruction sets give the same bits.

#define LARGEBATCH_INLINED __attribute__((always_inline))
#define LARGEBATCH_INLINE LARGEBATCH_INLINED inline

namespace {

#if defined(LARGEBATCH_AVX512)
constexpr int vector_bytes = 64;
#elif defined(LARGEBATCH_AVX2)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int lanes_of = vector_bytes / static_cast<int>(sizeof(T));

using Words = Vector<uint32_t>;
// as many as a vector has floats
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

template <class T> LARGEBATCH_INLINE Vector<T> splat(double value) {
  return Vector<T>{} + static_cast<T>(value);
}

template <class V> LARGEBATCH_INLINE V loaded(const void* address) {
  V values;
  __builtin_memcpy(&values, address, sizeof values);
  return values;
}

template <class V> LARGEBATCH_INLINE void stored(void* address, V values) {
  __builtin_memcpy(address, &values, sizeof values);
}

// --- what the extensions lack ---------------------------------------------------------------------------------------

struct Doubles {
  Vector<double> low, high;
};

#if defined(LARGEBATCH_AVX512)

LARGEBATCH_INLINE Doubles widened(Vector<float> x) {
  return {(Vector<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
          (Vector<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
}
LARGEBATCH_INLINE Vector<float> square_root(Vector<float> x) {
  return (Vector<float>)_mm512_sqrt_ps((__m512)x);
}
LARGEBATCH_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
}
LARGEBATCH_INLINE Vector<double> plus_square(Vector<double> sum, Vector<double> x) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)x, (__m512d)sum);
}

#elif defined(LARGEBATCH_AVX2)

LARGEBATCH_INLINE Doubles widened(Vector<float> x) {
  return {(Vector<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
          (Vector<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
}
LARGEBATCH_INLINE Vector<float> square_root(Vector<float> x) {
  return (Vector<float>)_mm256_sqrt_ps((__m256)x);
}
LARGEBATCH_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
}
LARGEBATCH_INLINE Vector<double> plus_square(Vector<double> sum, Vector<double> x) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)x, (__m256d)sum);
}

#else

LARGEBATCH_INLINE Doubles widened(Vector<float> x) {
  return {Vector<double>{x[0], x[1]}, Vector<double>{x[2], x[3]}};
}
LARGEBATCH_INLINE Vector<float> square_root(Vector<float> x) {
  return Vector<float>{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]),
                       __builtin_sqrtf(x[3])};
}
LARGEBATCH_INLINE Vector<double> square_root(Vector<double> x) {
  return Vector<double>{__builtin_sqrt(x[0]), __builtin_sqrt(x[1])};
}
LARGEBATCH_INLINE Vector<double> plus_square(Vector<double> sum, Vector<double> x) {
  return sum + x * x;
}

#endif

// --- two bytes --------------------------------------------------------------------------------------------------------

LARGEBATCH_INLINE Vector<float> from_bf16(Halves x) {
  return (Vector<float>)(__builtin_convertvector(x, Words) << 16);
}

LARGEBATCH_INLINE Halves to_bf16(Vector<float> x) {  // to nearest, ties to even
  const Words bits = (Words)x, rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const auto is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return __builtin_convertvector(is_nan ? Words{} + 0x7FC0u : rounded, Halves);
}

LARGEBATCH_INLINE Vector<float> from_fp16(Halves x) {
  const Words half = __builtin_convertvector(x, Words), magnitude = half & 0x7FFFu;
  // the exponent's bias differs by 112: a product with 2^112 is exact and right for subnormal numbers, too
  const Vector<float> scaled = (Vector<float>)(magnitude << 13) * 0x1p112f;
  const Words bits = magnitude >= 0x7C00u ? 0x7F800000u | magnitude << 13 : (Words)scaled;
  return (Vector<float>)((half & 0x8000u) << 16 | bits);
}

LARGEBATCH_INLINE Halves to_fp16(Vector<float> x) {  // to nearest, ties to even
  const Words bits = (Words)x, magnitude = bits & 0x7FFFFFFFu;
  const Words normal = (magnitude - 0x38000000u + 0x0FFFu + (magnitude >> 13 & 1u)) >> 13;
  // below 2^-14: adding 1/2 leaves the bits of a subnormal fp16 number at the end of the fp32 one
  const Words subnormal = (Words)((Vector<float>)magnitude + 0.5f) - 0x3F000000u;
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? Words{} + 0x7C00u : half;  // rounds to 65536 or is infinite
  half = magnitude > 0x7F800000u ? Words{} + 0x7E00u : half;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000u), Halves);
}

}  // namespace
