// Depthwise conv-BN branches in training, without ever writing a branch's map to memory.
//
// Three passes over channels-last float32 maps, for N branches with k x k kernels over one input
// (k is 3 or 5, padding k / 2; the fourth, the one convolution that they sum to, is PyTorch's):
//   stats   sums of z_n and z_n^2            (forward, for mean and variance of every branch)
//   reduce  sums of dy and dy x[p + t]       (backward, for the sums that batch norm needs)
//   grads   dx and dW_n, from dz_n = a_n dy + b_n z_n + c_n
// z_n is computed where it is needed, a row at a time, from rows of x that stay in cache. Rows are
// shifted by an estimate of the channel's mean and padded with 0 - shift, so that every z_n differs
// from the true one by the constant shift * sum(W_n): no variance is a difference of large numbers.
//
// A row (W positions of C channels) is walked as one line of W * C floats, in vectors of LANES.
// Weights repeat every C floats; repeated g = LANES / gcd(C, LANES) times they repeat every whole
// number of vectors ("blocks"), so that no lane is wasted at 8, 12, 20 or 36 channels. With stride s
// the columns of a row are stored by phase (column mod s), so that a tap is again one contiguous line.
//
// Each (image, chunk of channels) is one task with its own sums, added in float64 in a fixed order:
// results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

constexpr int64_t CACHE_FLOATS = 8192;  // of rows of x; with those of dz they fill the first cache

// Geometry of one call: map, kernel, and how a row is cut into lines.
struct Plan {
  int64_t B, C, H, W, k, stride, pad, Ho, Wo;
  int64_t chunk, chunks;         // channels of a task
  int64_t lanes, blocks, groups; // lanes = g * chunk = blocks * LANES; a row has `groups` of them
  int64_t margin;                // floats before the first position of a stored line
  int64_t length;                // floats of a stored line, margins included
  int64_t taps[5];               // see tap()

  Plan(const at::Tensor& x, int64_t k, int64_t stride)
      : B(x.size(0)), C(x.size(1)), H(x.size(2)), W(x.size(3)), k(k), stride(stride), pad(k / 2),
        Ho((H - 1) / stride + 1), Wo((W - 1) / stride + 1) {
    chunk = C;
    if (C % LANES == 0) {
      const int64_t all = C / LANES;
      int64_t n = std::max<int64_t>(1, CACHE_FLOATS / (k * (W + 2 * pad) * LANES));
      n = std::min(n, all);
      while (all % n) --n;
      chunk = n * LANES;
    }
    chunks = C / chunk;
    lanes = chunk / std::gcd(chunk, LANES) * LANES;
    blocks = lanes / LANES;
    groups = (Wo * chunk + lanes - 1) / lanes;
    margin = (pad * chunk + LANES - 1) / LANES * LANES;  // lines begin at whole vectors: no split loads
    length = groups * lanes + 2 * margin;
    for (int64_t t = 0; t < k && t < 5; ++t) {
      const int64_t at = t - pad, q = at >= 0 ? at / stride : -((stride - 1 - at) / stride);
      taps[t] = (at - q * stride) * length + margin + q * chunk;
    }
  }
  int64_t kk() const { return k * k; }
  int64_t row() const { return length * stride; }
  int64_t line() const { return groups * lanes; }
  int64_t valid() const { return Wo * chunk; }
  int64_t full_groups() const { return valid() / lanes; }
  // Where the tap of column t of the kernel begins in a stored row, for output column 0.
  int64_t tap(int64_t t) const { return taps[t]; }
};

// Floats that begin at a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t n)  // not initialised
      : data_(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t(64)))) {}
  static Buffer zeros(int64_t n) {
    Buffer out(n);
    std::fill_n(out.data_, n, 0.f);
    return out;
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  float* data() { return data_; }
  const float* data() const { return data_; }

 private:
  float* data_;
};

// Values (rows, C) as tasks read them: vector j of row r, for channels from c0 on, begins at
// at(r, c0) + j. Repeated over the lanes unless a chunk is a whole number of vectors by itself.
class Repeated {
 public:
  Repeated(const Plan& p, const float* values, int64_t rows)
      : copy_(p.lanes == p.chunk ? 0 : rows * p.lanes), data_(values), pitch_(p.C) {
    if (p.lanes == p.chunk) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < p.lanes; f += p.C)
        std::copy_n(values + r * p.C, p.C, copy_.data() + r * p.lanes + f);
    data_ = copy_.data();
    pitch_ = p.lanes;
  }
  const float* at(int64_t row, int64_t c0) const { return data_ + row * pitch_ + c0; }
  int64_t pitch() const { return pitch_; }

 private:
  Buffer copy_;
  const float* data_;
  int64_t pitch_;
};

// (rows, lanes) -> (rows, C) at channels c0...: sum of the repetitions.
void gather(const Plan& p, const Buffer& buffer, int64_t rows, int64_t c0, float* out) {
  const float* sums = buffer.data();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.chunk; ++c) {
      float sum = 0;
      for (int64_t f = c; f < p.lanes; f += p.chunk) sum += sums[r * p.lanes + f];
      out[r * p.C + c0 + c] = sum;
    }
  }
}

// Copy `columns` positions, `step` apart in the map, to a line, minus `shift`.
inline void copy_row(const Plan& p, const float* from, float* to, int64_t columns, int64_t step,
                     const float* shift) {
  const int64_t C = p.C, chunk = p.chunk, lanes = p.lanes;
  if (step == 1 && chunk == C) {
    const int64_t n = columns * C, whole = n / lanes * lanes;
    for (int64_t f = 0; f < whole; f += lanes)
      for (int64_t j = 0; j < lanes; j += LANES)
        store(to + f + j, load(from + f + j) - load(shift + j));
    for (int64_t f = whole; f < n; ++f) to[f] = from[f] - shift[f - whole];
    return;
  }
  const int64_t whole = chunk / LANES * LANES;
  for (int64_t w = 0; w < columns; ++w, from += step * C, to += chunk) {
    for (int64_t c = 0; c < whole; c += LANES) store(to + c, load(from + c) - load(shift + c));
    for (int64_t c = whole; c < chunk; ++c) to[c] = from[c] - shift[c];
  }
}

// The rows of one image that a kernel position sees: shifted, padded, by phase; kept while needed.
class Rows {
 public:
  Rows(const Plan& p, const float* image, const float* shift)
      : p_(p), image_(image), shift_(shift), kept_(p.k + p.stride), memory_((kept_ + 1) * p.row()),
        held_(kept_, -1) {
    for (int64_t line = 0; line < (kept_ + 1) * p.stride; ++line)
      fill(p, memory_.data() + line * p.length, shift);
  }
  // Write 0 - shift to every place of a line.
  static void fill(const Plan& p, float* line, const float* shift) {
    for (int64_t i = p.margin; i < p.length; i += p.chunk)
      for (int64_t c = 0; c < std::min(p.chunk, p.length - i); ++c) line[i + c] = -shift[c];
    for (int64_t i = p.margin - p.pad * p.chunk; i < p.margin; i += p.chunk)
      for (int64_t c = 0; c < p.chunk; ++c) line[i + c] = -shift[c];
  }
  // Set rows[t] to row i * stride + t - pad of the map, for t in 0 .. k - 1.
  void at(int64_t i, const float** rows) {
    for (int64_t t = 0; t < p_.k; ++t) {
      const int64_t h = i * p_.stride + t - p_.pad;
      rows[t] = h < 0 || h >= p_.H ? memory_.data() + kept_ * p_.row() : get(h);
    }
  }

 private:
  const float* get(int64_t h) {
    float* line = memory_.data() + h % kept_ * p_.row();
    if (held_[h % kept_] == h) return line;
    held_[h % kept_] = h;
    const float* from = image_ + h * p_.W * p_.C;
    for (int64_t phase = 0; phase < p_.stride; ++phase)
      copy_row(p_, from + phase * p_.C, line + phase * p_.length + p_.margin,
               (p_.W - phase + p_.stride - 1) / p_.stride, p_.stride, shift_);
    return line;
  }
  const Plan& p_;
  const float* image_;
  const float* shift_;
  const int64_t kept_;
  Buffer memory_;
  std::vector<int64_t> held_;
};

// Call use(f, z) for every vector of block j of conv(rows, w); f is its place in the row.
template <int K, class Use>
inline void convolve(const Plan& p, const float** rows, const float* w, int64_t pitch, int64_t j,
                     Use use) {
  Vec weight[K * K];
  const float* tap[K * K];
  const int64_t lanes = p.lanes, line = p.line();
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) {
    weight[t] = load(w + t * pitch + j);
    tap[t] = rows[t / K] + p.tap(t % K);
  }
  for (int64_t f = j; f < line; f += lanes) {
    Vec z[K];
#pragma GCC unroll 5
    for (int a = 0; a < K; ++a) {
      z[a] = weight[a * K] * load(tap[a * K] + f);
#pragma GCC unroll 5
      for (int b = 1; b < K; ++b) z[a] += weight[a * K + b] * load(tap[a * K + b] + f);
    }
    Vec sum = z[0];
#pragma GCC unroll 5
    for (int a = 1; a < K; ++a) sum += z[a];
    use(f, sum);
  }
}

// sums[t] += sum over the row of signal[f] * tap t, for block j; a last one of the signal itself.
template <int K>
inline void correlate(const Plan& p, const float** rows, const float* signal, int64_t j,
                      float* sums) {
  Vec acc[K * K] = {}, plain = {};
  const float* tap[K * K];
  const int64_t lanes = p.lanes, line = p.line();
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) tap[t] = rows[t / K] + p.tap(t % K);
  for (int64_t f = j; f < line; f += lanes) {
    const Vec s = load(signal + f);
    plain += s;
#pragma GCC unroll 25
    for (int t = 0; t < K * K; ++t) acc[t] += s * load(tap[t] + f);
  }
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) {
    float* at = sums + t * lanes + j;
    store(at, load(at) + acc[t]);
  }
  float* at = sums + K * K * lanes + j;
  store(at, load(at) + plain);
}

// 1 in the lanes of vector f that belong to the row, 0 behind its end.
inline Vec mask(const Plan& p, int64_t f) {
  Vec m;
  for (int64_t l = 0; l < LANES; ++l) m[l] = f + l < p.valid() ? 1.f : 0.f;
  return m;
}

// Block j of one row of dz = a dy + b z + c, and of its correlation with the taps.
template <int K>
inline void backward(const Plan& p, const float** rows, const float* dy, const float* w,
                     int64_t pitch, const float* abc, int64_t next, int64_t j, float* dz,
                     float* sums) {
  const float* tap[K * K];
  const int64_t lanes = p.lanes, line = p.line(), valid = p.valid();
  const Vec a = load(abc), b = load(abc + next), c = load(abc + 2 * next);
  Vec acc[K * K] = {};
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) tap[t] = rows[t / K] + p.tap(t % K);
  for (int64_t f = j; f < line; f += lanes) {
    Vec x[K * K], z[K];
#pragma GCC unroll 5
    for (int r = 0; r < K; ++r) {
#pragma GCC unroll 5
      for (int t = r * K; t < (r + 1) * K; ++t) {
        x[t] = load(tap[t] + f);
        z[r] = t == r * K ? load(w + t * pitch) * x[t] : z[r] + load(w + t * pitch) * x[t];
      }
    }
    Vec all = z[0];
#pragma GCC unroll 5
    for (int r = 1; r < K; ++r) all += z[r];
    Vec d = a * load(dy + f) + (b * all + c);
    if (f + LANES > valid) d *= mask(p, f);
    store(dz + f, d);
#pragma GCC unroll 25
    for (int t = 0; t < K * K; ++t) acc[t] += d * x[t];
  }
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) store(sums + t * lanes, load(sums + t * lanes) + acc[t]);
}

// sum += the taps of one branch, for block j of a row: T lines, each times its weight.
template <int T>
inline void add_lines(const Plan& p, const float** w, const float** from, int64_t j, float* sum) {
  const int64_t lanes = p.lanes, line = p.line();
  Vec weight[T];
#pragma GCC unroll 25
  for (int t = 0; t < T; ++t) weight[t] = load(w[t]);
  for (int64_t f = j; f < line; f += lanes) {
    Vec first = load(sum + f), second = {};  // two chains: an addition takes four cycles
#pragma GCC unroll 25
    for (int t = 0; t < T; ++t) (t % 2 ? second : first) += weight[t] * load(from[t] + f);
    store(sum + f, first + second);
  }
}

// With the number of taps that stride and border leave known to the compiler.
inline void add_taps(const Plan& p, int taps, const float** w, const float** from, int64_t j,
                     float* sum) {
  switch (taps) {
#define TAPS(T) case T: return add_lines<T>(p, w, from, j, sum);
    TAPS(1) TAPS(2) TAPS(3) TAPS(4) TAPS(6) TAPS(9) TAPS(10) TAPS(15) TAPS(20) TAPS(25)
#undef TAPS
    default:
      for (int t = 0; t < taps; ++t) add_lines<1>(p, w + t, from + t, j, sum);
  }
}

// A task for each image and chunk of channels.
template <class Task>
void each(const Plan& p, Task task) {
  at::parallel_for(0, p.B * p.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / p.chunks, i % p.chunks * p.chunk);
  });
}

// (B, rows, C) float32 -> (rows, C) float64, image after image.
at::Tensor over_images(const at::Tensor& parts) {
  auto sums = at::zeros({parts.size(1), parts.size(2)}, parts.options().dtype(at::kDouble));
  const int64_t n = sums.numel();
  const float* from = parts.const_data_ptr<float>();
  double* to = sums.data_ptr<double>();
  for (int64_t b = 0; b < parts.size(0); ++b)
    for (int64_t i = 0; i < n; ++i) to[i] += from[b * n + i];
  return sums;
}

void check(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast),
              name, " must be a channels-last float32 map on the CPU");
}

// (2, N + 1, C) float64: sums of z_n and of z_n^2 over all positions, z of shifted x; the last
// "branch" is x itself at the kernel's centre.
template <int K>
at::Tensor stats_k(const at::Tensor& x, const at::Tensor& w, const at::Tensor& shift,
                   int64_t stride) {
  const Plan p(x, K, stride);
  const int64_t N = w.size(0), rows_out = 2 * (N + 1);
  auto parts = at::empty({p.B, rows_out, p.C}, w.options());
  const float *X = x.const_data_ptr<float>(), *Wt = w.const_data_ptr<float>(),
              *S = shift.const_data_ptr<float>();
  float* out = parts.data_ptr<float>();
  const Repeated weight(p, Wt, N * p.kk()), mean(p, S, 1);
  each(p, [&](int64_t b, int64_t c0) {
    Buffer sums = Buffer::zeros(rows_out * p.lanes);
    Rows map(p, X + b * p.H * p.W * p.C + c0, mean.at(0, c0));
    const float* rows[K];
    const int64_t end = p.full_groups() * p.lanes;
    for (int64_t i = 0; i < p.Ho; ++i) {
      map.at(i, rows);
      for (int64_t n = 0; n <= N; ++n) {
        for (int64_t j = 0; j < p.lanes; j += LANES) {
          Vec sum = {}, square = {};
          auto use = [&](int64_t f, Vec z) {
            if (f >= end) z *= mask(p, f);
            sum += z;
            square += z * z;
          };
          if (n < N) {
            convolve<K>(p, rows, weight.at(n * K * K, c0), weight.pitch(), j, use);
          } else {
            const float* centre = rows[K / 2] + p.tap(K / 2);
            for (int64_t f = j; f < p.line(); f += p.lanes) use(f, load(centre + f));
          }
          float *to = sums.data() + n * p.lanes + j, *to2 = to + (N + 1) * p.lanes;
          store(to, load(to) + sum);
          store(to2, load(to2) + square);
        }
      }
    }
    gather(p, sums, rows_out, c0, out + b * rows_out * p.C);
  });
  return over_images(parts).view({2, N + 1, p.C});
}

// (k k + 1, C) float64: sums of dy times each tap of shifted x, then of dy.
template <int K>
at::Tensor reduce_k(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& shift,
                    int64_t stride) {
  const Plan p(x, K, stride);
  const int64_t rows_out = p.kk() + 1;
  auto parts = at::empty({p.B, rows_out, p.C}, shift.options());
  const float *X = x.const_data_ptr<float>(), *D = dy.const_data_ptr<float>(),
              *S = shift.const_data_ptr<float>();
  float* out = parts.data_ptr<float>();
  const Repeated mean(p, S, 1);
  const Buffer zero = Buffer::zeros(p.lanes);
  each(p, [&](int64_t b, int64_t c0) {
    Buffer sums = Buffer::zeros(rows_out * p.lanes), line = Buffer::zeros(p.line());
    Rows map(p, X + b * p.H * p.W * p.C + c0, mean.at(0, c0));
    const float* rows[K];
    for (int64_t i = 0; i < p.Ho; ++i) {
      map.at(i, rows);
      copy_row(p, D + (b * p.Ho + i) * p.Wo * p.C + c0, line.data(), p.Wo, 1, zero.data());
      for (int64_t j = 0; j < p.lanes; j += LANES)
        correlate<K>(p, rows, line.data(), j, sums.data());
    }
    gather(p, sums, rows_out, c0, out + b * rows_out * p.C);
  });
  return over_images(parts);
}

// dx and dW (N, k, k, C) float64, from dz_n = a_n dy + b_n z_n + c_n per branch and
// channel (abc: rows a, b, c); z of shifted x, and dW is against shifted x too. dx gets on top, at the
// kernel's centre, a dy + b x + c of the branches of a single tap together (tap_abc).
template <int K>
std::tuple<at::Tensor, at::Tensor> grads_k(const at::Tensor& x, const at::Tensor& dy,
                                           const at::Tensor& w, const at::Tensor& shift,
                                           const at::Tensor& abc, const at::Tensor& tap_abc,
                                           int64_t stride) {
  const Plan p(x, K, stride);
  const int64_t N = w.size(0), rows_out = N * p.kk();
  auto dx = at::empty_like(x);
  auto parts = at::empty({p.B, rows_out, p.C}, w.options());
  const float *X = x.const_data_ptr<float>(), *D = dy.const_data_ptr<float>(),
              *Wt = w.const_data_ptr<float>(), *S = shift.const_data_ptr<float>(),
              *Abc = abc.const_data_ptr<float>(), *Tap = tap_abc.const_data_ptr<float>();
  float *DX = dx.data_ptr<float>(), *out = parts.data_ptr<float>();
  const Repeated weight(p, Wt, rows_out), mean(p, S, 1), branch(p, Abc, 3 * N), tap(p, Tap, 3);
  const Buffer zero = Buffer::zeros(p.lanes);
  each(p, [&](int64_t b, int64_t c0) {
    Buffer sums = Buffer::zeros(rows_out * p.lanes), line = Buffer::zeros(p.line());
    // Rows of dz: K are kept, each with N + 1 lines (the last: branches of one tap), margins of 0.
    Buffer kept(K * (N + 1) * p.length), sum(p.line());
    for (float* at = kept.data(); at < kept.data() + K * (N + 1) * p.length; at += p.length) {
      std::fill_n(at, p.margin, 0.f);
      std::fill_n(at + p.margin + p.line(), p.margin, 0.f);
    }
    auto dz = [&](int64_t i, int64_t n) {
      return kept.data() + (i % K * (N + 1) + n) * p.length + p.margin;
    };
    Rows map(p, X + b * p.H * p.W * p.C + c0, mean.at(0, c0));
    const float* rows[K];
    int64_t done = 0;  // rows of dx
    for (int64_t i = 0; i < p.Ho; ++i) {
      map.at(i, rows);
      copy_row(p, D + (b * p.Ho + i) * p.Wo * p.C + c0, line.data(), p.Wo, 1, zero.data());
      const float* centre = rows[K / 2] + p.tap(K / 2);
      for (int64_t j = 0; j < p.lanes; j += LANES) {
        for (int64_t n = 0; n < N; ++n)
          backward<K>(p, rows, line.data(), weight.at(n * K * K, c0) + j, weight.pitch(),
                      branch.at(n, c0) + j, N * branch.pitch(), j, dz(i, n),
                      sums.data() + n * K * K * p.lanes + j);
        const Vec ta = load(tap.at(0, c0) + j), tb = load(tap.at(1, c0) + j), tc = load(tap.at(2, c0) + j);
        float* to = dz(i, N);
        for (int64_t f = j; f < p.line(); f += p.lanes)
          store(to + f, ta * load(line.data() + f) + (tb * load(centre + f) + tc));
      }
      for (int64_t n = 0; n <= N; ++n)
        std::fill(dz(i, n) + p.valid(), dz(i, n) + p.line(), 0.f);
      // Rows of dx that no later row of dz reaches.
      const int64_t ready = i + 1 == p.Ho ? p.H : (i + 1) * stride - p.pad;
      for (; done < ready; ++done) {
        for (int64_t phase = 0; phase < stride; ++phase) {
          const bool single = done % stride == 0 && phase == 0;
          // The taps that reach this row and these columns, and what they read of branch 0.
          int64_t which[K * K];
          const float* lines[K * K];
          int taps = 0;
          for (int64_t a = 0; a < K; ++a) {
            const int64_t from_row = done + p.pad - a, o = from_row / stride;
            if (from_row < 0 || from_row % stride || o >= p.Ho) continue;
            for (int64_t t = 0; t < K; ++t) {
              const int64_t column = phase + p.pad - t;
              if (column % stride) continue;
              which[taps] = a * K + t;
              lines[taps++] = dz(o, 0) + column / stride * p.chunk;
            }
          }
          const float* centre = single ? dz(done / stride, N) : nullptr;
          for (int64_t j = 0; j < p.lanes; j += LANES) {
            for (int64_t f = j; f < p.line(); f += p.lanes)
              store(sum.data() + f, single ? load(centre + f) : Vec{});
            for (int64_t n = 0; n < N; ++n) {
              const float *w[K * K], *from[K * K];
              for (int t = 0; t < taps; ++t) {
                w[t] = weight.at(n * K * K + which[t], c0) + j;
                from[t] = lines[t] + n * p.length;
              }
              add_taps(p, taps, w, from, j, sum.data());
            }
          }
          float* to = DX + (b * p.H + done) * p.W * p.C + c0;
          if (stride == 1 && p.chunk == p.C) {
            std::memcpy(to, sum.data(), p.valid() * sizeof(float));
          } else {
            const float* from = sum.data();
            for (int64_t v = phase; v < p.W; v += stride, from += p.chunk) {
              int64_t f = 0;
              for (; f + LANES <= p.chunk; f += LANES) store(to + v * p.C + f, load(from + f));
              for (; f < p.chunk; ++f) to[v * p.C + f] = from[f];
            }
          }
        }
      }
    }
    gather(p, sums, rows_out, c0, out + b * rows_out * p.C);
  });
  return {dx, over_images(parts).view({N, p.k, p.k, p.C})};
}

#define BY_KERNEL(k, call)                                     \
  switch (k) {                                                 \
    case 3: { constexpr int K = 3; return call; }              \
    case 5: { constexpr int K = 5; return call; }              \
    default: TORCH_CHECK(false, "kernel side ", k, ": 3 or 5");  \
  }

at::Tensor stats(const at::Tensor& x, const at::Tensor& w, const at::Tensor& shift, int64_t stride) {
  check(x, "x");
  BY_KERNEL(w.size(1), stats_k<K>(x, w, shift, stride))
}
at::Tensor reduce(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& shift, int64_t k, int64_t stride) {
  check(x, "x");
  check(dy, "dy");
  BY_KERNEL(k, reduce_k<K>(x, dy, shift, stride))
}
std::tuple<at::Tensor, at::Tensor> grads(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& w,
                                         const at::Tensor& shift, const at::Tensor& abc,
                                         const at::Tensor& tap_abc, int64_t stride) {
  check(x, "x");
  check(dy, "dy");
  BY_KERNEL(w.size(1), grads_k<K>(x, dy, w, shift, abc, tap_abc, stride))
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ghosttrain, m) {
  m.def("depthwise_stats(Tensor x, Tensor w, Tensor shift, int stride) -> Tensor");
  m.def("depthwise_reduce(Tensor x, Tensor dy, Tensor shift, int k, int stride) -> Tensor");
  m.def(
      "depthwise_grads(Tensor x, Tensor dy, Tensor w, Tensor shift, Tensor abc, Tensor tap_abc, int "
      "stride) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(ghosttrain, CPU, m) {
  m.impl("depthwise_stats", &stats);
  m.impl("depthwise_reduce", &reduce);
  m.impl("depthwise_grads", &grads);
}
