// LAMB and weight averaging in one walk over memory, for lists of float32 tensors on the CPU.
//
// `lamb_` and `ema_` return false, having done nothing, where a tensor is not such a one; the caller
// has another path for that. Both bring the memory of a tensor into the cache once and finish it
// there: they take about as long as reading and writing it. A tensor belongs to one thread, so
// results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using at::Tensor;
using at::TensorList;

// Elements between two prefetches, and summed in float32 before float64 takes over.
constexpr int64_t kStrip = 64;
// How many elements ahead memory is asked for. Saying so early that it will be written makes the
// step 1.15 times faster than what the processor guesses; past the end of a tensor it is harmless.
constexpr int64_t kAhead = 512;
// Elements of the second pass walked forwards before the next step backwards.
constexpr int64_t kBack = 1024;
constexpr int64_t kCacheLine = 64 / sizeof(float);

inline void soon_read(const float* at) {
  for (int64_t i = 0; i < kStrip; i += kCacheLine) __builtin_prefetch(at + kAhead + i, 0);
}

template <typename... Pointers>
inline void soon_written(const Pointers*... at) {
  for (int64_t i = 0; i < kStrip; i += kCacheLine) (__builtin_prefetch(at + kAhead + i, 1), ...);
}

bool dense_on_cpu(const Tensor& t) {
  return t.layout() == at::kStrided && t.is_cpu() && t.is_non_overlapping_and_dense();
}

bool dense_float(const Tensor& t) { return t.scalar_type() == at::kFloat && dense_on_cpu(t); }

// Whether element i in memory is the same element of both; a dimension of size 1 has no stride.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Call f(k) for every k below n, each in one thread; the next free thread takes the next k.
template <typename F>
void for_each_tensor(int64_t n, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t k = next++; k < n; k = next++) f(k);
    }
  });
}

// Memory of this thread for n numbers; kept, because fresh pages cost more than the arithmetic.
float* scratch(int64_t n) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (n > size) {
    memory.reset(new float[n]);
    size = n;
  }
  return memory.get();
}

struct Step {
  float lr, decay, eps, beta1_rest, beta2, beta2_rest, m_scale, v_scale;
};

// Adam's direction plus decay; moments are updated on the way.
inline float direction(const Step& s, float p, float g, float& m, float& v) {
  m += s.beta1_rest * (g - m);
  v = s.beta2 * v + s.beta2_rest * g * g;
  return s.m_scale * m / (s.v_scale * std::sqrt(v) + s.eps) + s.decay * p;
}

void adam(const Step& s, int64_t n, float* __restrict p, const float* __restrict g,
          float* __restrict m, float* __restrict v) {
  for (int64_t start = 0; start < n; start += kStrip) {
    soon_written(p + start, m + start, v + start);
    soon_read(g + start);
    const int64_t stop = std::min(n, start + kStrip);
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) p[i] -= s.lr * direction(s, p[i], g[i], m[i], v[i]);
  }
}

void lamb(const Step& s, int64_t n, float* __restrict p, const float* __restrict g,
          float* __restrict m, float* __restrict v) {
  float* __restrict u = scratch(n);
  double p_squares = 0, u_squares = 0;
  for (int64_t start = 0; start < n; start += kStrip) {
    soon_written(p + start, m + start, v + start, u + start);
    soon_read(g + start);
    const int64_t stop = std::min(n, start + kStrip);
    float p_sum = 0, u_sum = 0;
#pragma omp simd reduction(+ : p_sum, u_sum)
    for (int64_t i = start; i < stop; ++i) {
      u[i] = direction(s, p[i], g[i], m[i], v[i]);
      p_sum += p[i] * p[i];
      u_sum += u[i] * u[i];
    }
    p_squares += p_sum;
    u_squares += u_sum;
  }
  const bool both = p_squares > 0 && u_squares > 0;
  const float rate = s.lr * static_cast<float>(both ? std::sqrt(p_squares / u_squares) : 1.0);
  for (int64_t stop = n; stop > 0;) {  // backwards: what came last is still in the cache
    const int64_t start = std::max<int64_t>(0, stop - kBack);
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) p[i] -= rate * u[i];
    stop = start;
  }
}

void lerp(int64_t n, float* __restrict average, const float* __restrict value, float weight) {
  for (int64_t start = 0; start < n; start += kStrip) {
    soon_written(average + start);
    soon_read(value + start);
    const int64_t stop = std::min(n, start + kStrip);
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) average[i] += weight * (value[i] - average[i]);
  }
}

// One step of LAMB for a group; the rule stands in ghosttrain/optim/lamb.py. Without `adapt` every
// trust ratio is 1. Gradients of another layout are copied, everything else must fit.
bool lamb_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
           int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
           bool adapt) {
  const int64_t count = params.size();
  std::vector<Tensor> fitting(grads.begin(), grads.end());
  for (int64_t k = 0; k < count; ++k) {
    const Tensor& p = params[k];
    for (const Tensor& t : {p, exp_avgs[k], exp_avg_sqs[k]}) {
      if (!dense_float(t) || !same_layout(t, p)) return false;
    }
    if (!dense_float(grads[k])) return false;
    if (!same_layout(grads[k], p)) fitting[k] = at::empty_like(p).copy_(grads[k]);
  }
  const double beta1_correction = 1 - std::pow(beta1, step);
  const double beta2_correction = 1 - std::pow(beta2, step);
  const Step s{static_cast<float>(lr),
               static_cast<float>(weight_decay),
               static_cast<float>(eps),
               static_cast<float>(1 - beta1),
               static_cast<float>(beta2),
               static_cast<float>(1 - beta2),
               static_cast<float>(1 / beta1_correction),
               static_cast<float>(1 / std::sqrt(beta2_correction))};
  for_each_tensor(count, [&](int64_t k) {
    (adapt ? lamb : adam)(s, params[k].numel(), params[k].mutable_data_ptr<float>(),
                          fitting[k].const_data_ptr<float>(),
                          exp_avgs[k].mutable_data_ptr<float>(),
                          exp_avg_sqs[k].mutable_data_ptr<float>());
    for (const Tensor& t : {params[k], exp_avgs[k], exp_avg_sqs[k]}) {
      t.unsafeGetTensorImpl()->bump_version();  // as every in-place operator does
    }
  });
  return true;
}

// average += weight (value - average) for float32; other dtypes, such as counters, are copied.
bool ema_(TensorList averages, TensorList values, double weight) {
  const int64_t count = averages.size();
  for (int64_t k = 0; k < count; ++k) {
    const Tensor &a = averages[k], &x = values[k];
    if (a.is_floating_point() && a.scalar_type() != at::kFloat) return false;
    if (a.scalar_type() != x.scalar_type()) return false;
    if (!dense_on_cpu(a) || !dense_on_cpu(x) || !same_layout(a, x)) return false;
  }
  const float w = static_cast<float>(weight);
  for_each_tensor(count, [&](int64_t k) {
    const Tensor &average = averages[k], &value = values[k];
    if (average.scalar_type() == at::kFloat) {
      lerp(average.numel(), average.mutable_data_ptr<float>(), value.const_data_ptr<float>(), w);
    } else {
      std::memcpy(average.mutable_data_ptr(), value.const_data_ptr(), value.nbytes());
    }
    average.unsafeGetTensorImpl()->bump_version();
  });
  return true;
}

}  // namespace

// Defined without a dispatch key: they look at the tensors themselves, on any device.
TORCH_LIBRARY_FRAGMENT(ghosttrain, m) {
  m.def(
      "lamb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "int step, float lr, float beta1, float beta2, float eps, float weight_decay, bool adapt) "
      "-> bool",
      &lamb_);
  m.def("ema_(Tensor(a!)[] averages, Tensor[] values, float weight) -> bool", &ema_);
}
