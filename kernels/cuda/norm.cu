// GroupNorm, then (1 + scale) v + shift, then SiLU, forward and backward, without atomics. What is normalised is (samples, places, channels),
// or two such arrays behind one another: x with the first `head` channels and tail with the rest.
//
// A block owns a slab: `span` neighbouring groups of one sample, over all places or over one of `parts` runs of them. Its channels are
// counted in vectors of N numbers, which may cross groups but not the arrays. A thread keeps to one column of vectors (or, where the slab is
// wider than the block, to every lanes-th) and walks down the places, BATCH vectors at a time so that several accesses are under way.
//
// A slab of all places is read from memory once: what the second pass needs stays in shared memory, where every thread finds its own
// again (norm_forward, norm_backward). Where that is too much, or the blocks would be too few, one kernel sums up the parts and a second
// one meets their sums and writes (norm_moments and norm_apply, norm_sums and norm_gradient).
//
// What is normalised, its gradients and the results are of type T, float or bf16; all else is float32. Of bf16 what is kept is the data
// as they were read: half the room of x_hat and dv, so that twice as large a slab is read once.
#include "common.cuh"

struct Slab {
  int sample, part, parts, span, group_size, channels;
  int first, width;             // its first channel, and how many it has
  int lane, lanes, row, rows;   // the thread's column and first place, and their strides; lanes is a power of two
  int team, teams;              // threads whose partial sums are kept apart: a warp, or a row where that is longer
  int from, to;                 // places
  float *table1, *table2, *group1, *group2, *counts;  // shared memory: (teams, width) twice, (span) twice, (teams)
  float* stash;                                       // and what is kept

  // A grid of (sets of groups fastest, samples) by parts
  static __device__ __forceinline__ Slab make(float* shared, int places, int channels, int groups, int span, int lanes, int stash) {
    Slab s;
    int sets = groups / span;
    s.sample = blockIdx.x / sets;
    s.part = blockIdx.y;
    s.parts = gridDim.y;
    s.span = span;
    s.group_size = channels / groups;
    s.channels = channels;
    s.width = span * s.group_size;
    s.first = blockIdx.x % sets * s.width;
    s.lanes = lanes;
    s.lane = threadIdx.x & (lanes - 1);
    s.row = threadIdx.x >> (__ffs(lanes) - 1);
    s.rows = blockDim.x >> (__ffs(lanes) - 1);
    int members = max(lanes, 32);
    s.team = threadIdx.x / members;
    s.teams = blockDim.x / members;
    int share = (places + s.parts - 1) / s.parts;
    s.from = min(s.part * share, places);
    s.to = min(s.from + share, places);
    s.table1 = shared;
    s.table2 = s.table1 + s.teams * s.width;
    s.group1 = s.table2 + s.teams * s.width;
    s.group2 = s.group1 + span;
    s.counts = s.group2 + span;
    s.stash = shared + stash;
    return s;
  }

  __device__ __forceinline__ int group() const { return first / group_size; }
};

// Where channel c of place 0 of the sample lies in [x, tail], and the step from a place to the next.
template <class T>
__device__ __forceinline__ T* column_of(T* x, T* tail, int head, int channels, int64 first_place, int c, int& stride) {
  bool behind = c >= head;
  stride = behind ? channels - head : head;
  return (behind ? tail + (c - head) : x + c) + first_place * stride;
}

// Of the channels from `c` of the slab on: mean and 1/sqrt(var + eps) of their groups, or any other two numbers of a group
template <int N>
__device__ __forceinline__ void of_groups(float (&a)[N], float (&b)[N], const float* first, const float* second, int c, int size) {
  int g = c / size, place = c - g * size;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    a[i] = first[g], b[i] = second[g];
    if (++place == size) place = 0, ++g;
  }
}

// (1 + scale) gamma and (1 + scale) beta + shift for the channels from c on
template <int N>
__device__ __forceinline__ void affine(float (&slope)[N], float (&offset)[N], const float* gamma, const float* beta, const float* scale,
                                       const float* shift, int64 of_sample, int c) {
  load<N>(slope, gamma + c);
  load<N>(offset, beta + c);
  if (!scale) return;
  float factor[N], term[N];
  load<N>(factor, scale + of_sample + c);
  load<N>(term, shift + of_sample + c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    slope[i] *= 1.0f + factor[i];
    offset[i] = fmaf(offset[i], 1.0f + factor[i], term[i]);
  }
}

struct Moments {
  float n, mean, m2;  // count, mean, sum of squared deviations
};

// The moments of several sets of data together, part(0), ..., part(count - 1), by a warp
template <class Part> __device__ __forceinline__ Moments together(int count, Part part) {
  float base = part(0).mean, n = 0.0f, sum = 0.0f, m2 = 0.0f;
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < count; k += 32) {
    Moments p = part(k);
    n += p.n;
    sum = fmaf(p.n, p.mean - base, sum);
  }
  n = warp_sum(n);
  float mean = base + __fdividef(warp_sum(sum), n);
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < count; k += 32) {
    Moments p = part(k);
    float d = p.mean - mean;
    m2 += fmaf(p.n * d, d, p.m2);
  }
  return {n, mean, warp_sum(m2)};
}

// Each channel's moments over a team's places, into the tables (mean and m2) and counts. A thread's sums are about its first element: that
// lies among the data, so nothing cancels. With KEEP the elements go to the stash.
template <class T, int N, bool KEEP>
__device__ __forceinline__ void read_moments(const Slab& s, const T* x, const T* tail, int places, int head) {
  const int BATCH = 4;
  T* keep = reinterpret_cast<T*>(s.stash) + N * threadIdx.x;
  for (int start = 0; start < s.width; start += N * s.lanes) {
    int c = start + N * s.lane, count = 0, stride;
    float shift[N] = {}, sum[N] = {}, squares[N] = {};
    const T* at = column_of(x, tail, head, s.channels, (int64)s.sample * places, s.first + c, stride);
    for (int place = s.from + s.row; c < s.width && place < s.to; place += BATCH * s.rows) {
      float v[BATCH][N];
#pragma unroll
      for (int u = 0; u < BATCH; ++u)
        if (place + u * s.rows < s.to) load<N>(v[u], at + (int64)(place + u * s.rows) * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) shift[i] = count ? shift[i] : v[0][i];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (place + u * s.rows >= s.to) break;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float d = v[u][i] - shift[i];
          sum[i] += d;
          squares[i] = fmaf(d, d, squares[i]);
        }
        ++count;
        if (KEEP) save<N>(keep, v[u]), keep += N * blockDim.x;
      }
    }
    float n = (float)count, mean[N], m2[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float off = count ? __fdividef(sum[i], n) : 0.0f;
      mean[i] = shift[i] + off;
      m2[i] = fmaxf(squares[i] - sum[i] * off, 0.0f);
    }
    for (int offset = s.lanes; offset < 32; offset *= 2) {  // the rows of a warp: Chan, Golub & LeVeque's moments of the union
      float other = __shfl_down_sync(EVERY_LANE, n, offset), all = n + other, share = all > 0.0f ? __fdividef(other, all) : 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float delta = __shfl_down_sync(EVERY_LANE, mean[i], offset) - mean[i], part = __shfl_down_sync(EVERY_LANE, m2[i], offset);
        m2[i] += fmaf(delta * delta, n * share, part);
        mean[i] = fmaf(delta, share, mean[i]);
      }
      n = all;
    }
    if (c >= s.width || (s.lanes < 32 && threadIdx.x % 32 >= s.lanes)) continue;
    save<N>(s.table1 + s.team * s.width + c, mean);
    save<N>(s.table2 + s.team * s.width + c, m2);
    if (c == 0) s.counts[s.team] = n;
  }
}

// y of the slab's places, once group1 and group2 hold the groups' mean and rstd
template <class T, int N, bool KEPT>
__device__ __forceinline__ void normalise(const Slab& s, const T* x, const T* tail, const float* gamma, const float* beta,
                                          const float* scale, const float* shift, T* y, int places, int head, int silu) {
  const int BATCH = 4;
  const T* kept = reinterpret_cast<const T*>(s.stash) + N * threadIdx.x;
  for (int c = N * s.lane; c < s.width; c += N * s.lanes) {
    float mean[N], slope[N], offset[N], rstd[N];
    of_groups<N>(mean, rstd, s.group1, s.group2, c, s.group_size);
    affine<N>(slope, offset, gamma, beta, scale, shift, (int64)s.sample * s.channels, s.first + c);
#pragma unroll
    for (int i = 0; i < N; ++i) slope[i] *= rstd[i];
    int stride;
    const T* at = column_of(x, tail, head, s.channels, (int64)s.sample * places, s.first + c, stride);
    T* to = y + (int64)s.sample * places * s.channels + s.first + c;
    for (int place = s.from + s.row; place < s.to; place += BATCH * s.rows) {
      float v[BATCH][N];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (place + u * s.rows >= s.to) break;
        if (KEPT) load<N>(v[u], kept), kept += N * blockDim.x;
        else load<N>(v[u], at + (int64)(place + u * s.rows) * stride);
      }
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (place + u * s.rows >= s.to) break;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          v[u][i] = fmaf(v[u][i] - mean[i], slope[i], offset[i]);
          if (silu) v[u][i] *= sigmoid(v[u][i]);
        }
        save<N>(to + (int64)(place + u * s.rows) * s.channels, v[u]);
      }
    }
  }
}

// READ: take the moments of the slab's places. WRITE: normalise them. Only one of them: partial (samples, parts, groups, 2) lies between.
template <class T, int N, bool READ, bool WRITE>
__device__ __forceinline__ void forward(const T* x, const T* tail, const float* scale, const float* shift, T* y, float* mean, float* rstd,
                                        float* partial, const float* gamma, const float* beta, int places, int head, int channels,
                                        int groups, int span, int lanes, int stash, float eps, int silu) {
  extern __shared__ float shared[];
  Slab s = Slab::make(shared, places, channels, groups, span, lanes, stash);
  if (READ) {
    read_moments<T, N, WRITE>(s, x, tail, places, head);
    __syncthreads();
  }
  for (int g = threadIdx.x / 32; g < span; g += blockDim.x / 32) {
    int64 group = (int64)s.sample * groups + s.group() + g;
    Moments all;
    if (READ) {
      all = together(s.teams * s.group_size, [&](int k) {
        int team = k / s.group_size, at = team * s.width + g * s.group_size + k % s.group_size;
        return Moments{s.counts[team], s.table1[at], s.table2[at]};
      });
    } else {
      int share = (places + s.parts - 1) / s.parts;
      all = together(s.parts, [&](int k) {
        const float* of_part = partial + (((int64)s.sample * s.parts + k) * groups + s.group() + g) * 2;
        return Moments{(float)max(min(places - k * share, share), 0) * s.group_size, of_part[0], of_part[1]};
      });
    }
    if (threadIdx.x % 32) continue;
    if (WRITE) {
      s.group1[g] = all.mean;
      s.group2[g] = rsqrtf(__fdividef(all.m2, all.n) + eps);
      if (s.part == 0) mean[group] = s.group1[g], rstd[group] = s.group2[g];
    } else {
      float* of_part = partial + (((int64)s.sample * s.parts + s.part) * groups + s.group() + g) * 2;
      of_part[0] = all.mean, of_part[1] = all.m2;
    }
  }
  if (!WRITE) return;
  __syncthreads();
  normalise<T, N, READ>(s, x, tail, gamma, beta, scale, shift, y, places, head, silu);
}

// dv: the gradient before the activation
__device__ __forceinline__ float before_silu(float dy, float v, int silu) {
  if (!silu) return dy;
  float s = sigmoid(v);
  return dy * (s * fmaf(v, 1.0f - s, 1.0f));
}

// What both passes of the gradient need of a thread's channels. Of float `slope` is that of x_hat. Of bf16 it is that of x - mean, which
// takes the place of x_hat: registers are short where the second pass begins with the data as they were read.
template <class T, int N> struct Backward {
  static const bool CENTRED = sizeof(T) < sizeof(float);
  float mean[N], rstd[N], slope[N], offset[N];
  const T *x, *dy;
  int stride;

  __device__ __forceinline__ Backward(const Slab& s, const T* dy_, const T* x_, const T* tail, const float* gamma, const float* beta,
                                      const float* means, const float* rstds, const float* scale, const float* shift, int places,
                                      int head, int groups, int c) {
    int64 group = (int64)s.sample * groups + s.group();
    of_groups<N>(mean, rstd, means + group, rstds + group, c, s.group_size);
    affine<N>(slope, offset, gamma, beta, scale, shift, (int64)s.sample * s.channels, s.first + c);
#pragma unroll
    for (int i = 0; CENTRED && i < N; ++i) slope[i] *= rstd[i];
    x = column_of(x_, tail, head, s.channels, (int64)s.sample * places, s.first + c, stride);
    dy = dy_ + (int64)s.sample * places * s.channels + s.first + c;
  }

  // v: x becomes x_hat, or x - mean; d: dy becomes dv
  __device__ __forceinline__ void activated(float (&v)[N], float (&d)[N], int silu) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] -= mean[i];
      if (!CENTRED) v[i] *= rstd[i];
      d[i] = before_silu(d[i], fmaf(v[i], slope[i], offset[i]), silu);
    }
  }
};

// With S1 = sum of dv and S2 = sum of dv x_hat over the places of a sample, per channel, and k = 1 + scale:
//   dshift = S1, dscale = gamma S2 + beta S1, this sample's shares of dgamma = k S2 and dbeta = k S1 (samples, 2, channels),
//   and dx = rstd (dv k gamma - <k gamma S1> - x_hat <k gamma S2>), <> the sum over a group by its number of elements.
// READ: sum up the slab's places. WRITE: the gradients. Only one of them: partial (samples, parts, 2, channels) lies between.
template <class T, int N, bool READ, bool WRITE>
__device__ __forceinline__ void backward(const T* x, const T* tail, const T* dy, const float* mean, const float* rstd, const float* scale,
                                         const float* shift, T* dx, T* dtail, float* shares, float* dscale, float* dshift, float* partial,
                                         const float* gamma, const float* beta, int places, int head, int channels, int groups, int span,
                                         int lanes, int stash, int silu) {
  const bool CENTRED = Backward<T, N>::CENTRED;
  const int BATCH = READ && WRITE && CENTRED ? 1 : 2;
  extern __shared__ float shared[];
  Slab s = Slab::make(shared, places, channels, groups, span, lanes, stash);
  int64 of_sample = (int64)s.sample * channels;
  T* mine = reinterpret_cast<T*>(s.stash) + N * threadIdx.x;
  int step = N * blockDim.x;  // of the stash, from one of a thread's vectors to its next

  for (int start = 0; READ && start < s.width; start += N * lanes) {
    int c = start + N * s.lane;
    float sum1[N] = {}, sum2[N] = {};
    if (c < s.width) {
      Backward<T, N> b(s, dy, x, tail, gamma, beta, mean, rstd, scale, shift, places, head, groups, c);
      for (int place = s.from + s.row; place < s.to; place += BATCH * s.rows) {
        float v[BATCH][N], d[BATCH][N];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
          if (place + u * s.rows >= s.to) break;
          load<N>(v[u], b.x + (int64)(place + u * s.rows) * b.stride);
          load<N>(d[u], b.dy + (int64)(place + u * s.rows) * channels);
        }
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
          if (place + u * s.rows >= s.to) break;
          if (WRITE && CENTRED) save<N>(mine, v[u]), save<N>(mine + step, d[u]), mine += 2 * step;
          b.activated(v[u], d[u], silu);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            sum1[i] += d[u][i];
            sum2[i] = fmaf(d[u][i], v[u][i], sum2[i]);
          }
          if (WRITE && !CENTRED) save<N>(mine, v[u]), save<N>(mine + step, d[u]), mine += 2 * step;
        }
      }
    }
    for (int offset = lanes; offset < 32; offset *= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum1[i] += __shfl_down_sync(EVERY_LANE, sum1[i], offset);
        sum2[i] += __shfl_down_sync(EVERY_LANE, sum2[i], offset);
      }
    if (c >= s.width || (lanes < 32 && threadIdx.x % 32 >= lanes)) continue;
    save<N>(s.table1 + s.team * s.width + c, sum1);
    save<N>(s.table2 + s.team * s.width + c, sum2);
  }
  if (READ) __syncthreads();

  // of each channel: S1 and S2, what follows from them, and k gamma S1 and k gamma S2 in the first row of the tables
#pragma unroll 1
  for (int k = threadIdx.x; k < s.width; k += blockDim.x) {
    int c = s.first + k;
    float s1 = 0.0f, s2 = 0.0f;
    if (READ)
      for (int team = 0; team < s.teams; ++team) s1 += s.table1[team * s.width + k], s2 += s.table2[team * s.width + k];
    float* of_part = partial + (int64)s.sample * s.parts * 2 * channels + c;
    if (!WRITE) {
      of_part[(int64)s.part * 2 * channels] = s1;
      of_part[((int64)s.part * 2 + 1) * channels] = s2;
      continue;
    }
    if (!READ)
#pragma unroll 4
      for (int part = 0; part < s.parts; ++part, of_part += 2 * (int64)channels) s1 += of_part[0], s2 += of_part[channels];
    if (CENTRED) s2 *= rstd[(int64)s.sample * groups + c / s.group_size];
    float factor = scale ? 1.0f + scale[of_sample + c] : 1.0f;
    if (s.part == 0) {
      if (scale) {
        dscale[of_sample + c] = fmaf(gamma[c], s2, beta[c] * s1);
        dshift[of_sample + c] = s1;
      }
      shares[2 * of_sample + c] = factor * s2;
      shares[2 * of_sample + channels + c] = factor * s1;
    }
    s.table1[k] = factor * gamma[c] * s1;
    s.table2[k] = factor * gamma[c] * s2;
  }
  if (!WRITE) return;
  __syncthreads();
  for (int g = threadIdx.x / 32; g < span; g += blockDim.x / 32) {
    float s1 = 0.0f, s2 = 0.0f;
#pragma unroll 1
    for (int k = threadIdx.x % 32; k < s.group_size; k += 32)
      s1 += s.table1[g * s.group_size + k], s2 += s.table2[g * s.group_size + k];
    s1 = warp_sum(s1), s2 = warp_sum(s2);
    float n = (float)places * s.group_size;
    if (threadIdx.x % 32) continue;
    s.group1[g] = __fdividef(s1, n), s.group2[g] = __fdividef(s2, n);
    if (CENTRED) {
      float factor = rstd[(int64)s.sample * groups + s.group() + g];
      s.group1[g] *= factor, s.group2[g] *= factor * factor;
    }
  }
  __syncthreads();

  mine = reinterpret_cast<T*>(s.stash) + N * threadIdx.x;
  for (int c = N * s.lane; c < s.width; c += N * lanes) {
    Backward<T, N> b(s, dy, x, tail, gamma, beta, mean, rstd, scale, shift, places, head, groups, c);
    float mean1[N], mean2[N];
    of_groups<N>(mean1, mean2, s.group1, s.group2, c, s.group_size);
    int stride;
    T* to = column_of(dx, dtail, head, channels, (int64)s.sample * places, s.first + c, stride);
    for (int place = s.from + s.row; place < s.to; place += BATCH * s.rows) {
      float v[BATCH][N], d[BATCH][N];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (place + u * s.rows >= s.to) break;
        if (READ) {
          load<N>(v[u], mine), load<N>(d[u], mine + step), mine += 2 * step;
        } else {
          load<N>(v[u], b.x + (int64)(place + u * s.rows) * b.stride);
          load<N>(d[u], b.dy + (int64)(place + u * s.rows) * channels);
        }
      }
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (place + u * s.rows >= s.to) break;
        if (!READ || CENTRED) b.activated(v[u], d[u], silu);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          d[u][i] = fmaf(d[u][i], b.slope[i], -mean1[i]) - v[u][i] * mean2[i];
          if (!CENTRED) d[u][i] *= b.rstd[i];
        }
        save<N>(to + (int64)(place + u * s.rows) * stride, d[u]);
      }
    }
  }
}

// out[c] = sum over samples of parts[sample, c]. A block of 32 x 16 threads makes 32 channels.
extern "C" __global__ void __launch_bounds__(512) norm_sum(const float* __restrict__ parts, float* __restrict__ out, int samples, int channels) {
  __shared__ float part[16][32];
  int c = blockIdx.x * 32 + threadIdx.x;
  float total = 0.0f;
  if (c < channels)
    for (int sample = threadIdx.y; sample < samples; sample += 16) total += parts[(int64)sample * channels + c];
  part[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= channels) return;
  for (int row = 1; row < 16; ++row) total += part[row][threadIdx.x];
  out[c] = total;
}

#define FORWARD(NAME, T, N, READ, WRITE)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(512, READ ? 2 : 1)                                                                        \
      NAME(const T* x, const T* tail, const float* scale, const float* shift, T* y, float* mean, float* rstd, float* partial,            \
           const float* gamma, const float* beta, int places, int head, int channels, int groups, int span, int lanes, int stash,        \
           float eps, int silu) {                                                                                                        \
    forward<T, N, READ, WRITE>(x, tail, scale, shift, y, mean, rstd, partial, gamma, beta, places, head, channels, groups, span, lanes,  \
                               stash, eps, silu);                                                                                        \
  }
#define BACKWARD(NAME, T, N, READ, WRITE)                                                                                                \
  extern "C" __global__ void __launch_bounds__(512, READ && N == 4 ? 2 : 1)                                                              \
      NAME(const T* x, const T* tail, const T* dy, const float* mean, const float* rstd, const float* scale, const float* shift, T* dx,  \
           T* dtail, float* shares, float* dscale, float* dshift, float* partial, const float* gamma, const float* beta, int places,     \
           int head, int channels, int groups, int span, int lanes, int stash, int silu) {                                               \
    backward<T, N, READ, WRITE>(x, tail, dy, mean, rstd, scale, shift, dx, dtail, shares, dscale, dshift, partial, gamma, beta, places,  \
                                head, channels, groups, span, lanes, stash, silu);                                                       \
  }
#define NORM(SUFFIX, T, N)                                \
  FORWARD(norm_forward_##SUFFIX, T, N, true, true)        \
  FORWARD(norm_moments_##SUFFIX, T, N, true, false)       \
  FORWARD(norm_apply_##SUFFIX, T, N, false, true)         \
  BACKWARD(norm_backward_##SUFFIX, T, N, true, true)      \
  BACKWARD(norm_sums_##SUFFIX, T, N, true, false)         \
  BACKWARD(norm_gradient_##SUFFIX, T, N, false, true)

NORM(wide, float, 4)
NORM(any, float, 1)
NORM(wide_bf16, bf16, 4)
NORM(any_bf16, bf16, 1)
