/* Loops that torch would make several passes of: weights are read as they are stored, widened,
 * computed with in float32, and rounded once, while they are in the first level of the cache.
 *
 * Everything here has a torch form beside its caller, which GPUs, float64 and machines without this
 * library use. Numbers do not depend on the processor: products are not contracted to fused ones, and
 * sums have as many lanes everywhere, whatever the length of vectors.
 *
 * An operand is n numbers of a kind (below), less others, and with more: where these are not NULL.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(ONE_PROCESSOR)
#define FOR_EVERY_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { TILE = 512, LANES = 16 }; /* elements at a time, and that are added side by side */
#ifndef MOST
#define MOST 32 /* operands */
#endif

typedef struct {
    const void *values, *less;
    const float *more;
    int32_t kind, less_kind;
} Operand;

/* What came of some rows: see weft.execute._kernel.Sums. */
typedef struct {
    double base, delta, error;
    int32_t changed, not_finite;
} Proof;

/* ------------------------------------------------------------------------------ conversions */

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16; /* half to even */
    return value != value ? 0x7FC0 : (uint16_t)rounded;
}

/* IEEE 754's binary16. By hand, since compilers before 2022 do not have it on every processor. */
INLINE float from_float16(uint16_t half) {
    uint32_t shifted = (uint32_t)(half & 0x7FFF) << 13;
    float finite = from_bits(shifted) * 0x1p112f; /* the exponent's bias, exact below 1 as well */
    uint32_t bits = (half & 0x7C00) == 0x7C00 ? shifted | 0x7F800000 : to_bits(finite);
    return from_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t magic = 126u << 23; /* 1/2, in whose last place lies the least of binary16 */
    uint32_t small = to_bits(from_bits(bits) + from_bits(magic)) - magic;
    uint32_t normal = (bits + 0xC8000FFF + (bits >> 13 & 1)) >> 13; /* half to even */
    uint32_t half = bits < 0x38800000 ? small : normal;
    half = bits >= 0x47800000 ? 0x7C00 : half;
    half = bits > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(half | sign);
}

/* n numbers from element `at` on, widened. */
INLINE void load(float *restrict out, const void *data, int kind, size_t at, size_t n) {
    if (kind == FLOAT32) {
        memcpy(out, (const float *)data + at, 4 * n);
    } else if (kind == BFLOAT16) {
        const uint16_t *in = (const uint16_t *)data + at;
        for (size_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)in[i] << 16);
    } else {
        const uint16_t *in = (const uint16_t *)data + at;
        for (size_t i = 0; i < n; i++) out[i] = from_float16(in[i]);
    }
}

INLINE void take(float *restrict out, const Operand *x, size_t at, size_t n) {
    load(out, x->values, x->kind, at, n);
    if (x->less) {
        float less[TILE];
        load(less, x->less, x->less_kind, at, n);
        for (size_t i = 0; i < n; i++) out[i] -= less[i];
    }
    if (x->more) {
        const float *more = x->more + at;
        for (size_t i = 0; i < n; i++) out[i] += more[i];
    }
}

/* Rounded to `kind`, and widened again in place. */
INLINE void store(float *restrict values, void *data, int kind, size_t at, size_t n) {
    if (kind == FLOAT32) {
        memcpy((float *)data + at, values, 4 * n);
    } else if (kind == BFLOAT16) {
        uint16_t *out = (uint16_t *)data + at;
        for (size_t i = 0; i < n; i++) {
            uint16_t bits = to_bfloat16(values[i]);
            out[i] = bits;
            values[i] = from_bits((uint32_t)bits << 16);
        }
    } else {
        uint16_t *out = (uint16_t *)data + at;
        for (size_t i = 0; i < n; i++) {
            uint16_t bits = to_float16(values[i]);
            out[i] = bits;
            values[i] = from_float16(bits);
        }
    }
}

/* ------------------------------------------------------------------------------------- sums */

INLINE double total(const float *lanes) {
    double sum = 0;
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

INLINE double dot(const float *x, const float *y, size_t n) {
    float lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += x[i + j] * y[i + j];
    for (int j = 0; i < n; i++, j++) lanes[j] += x[i] * y[i];
    return total(lanes);
}

INLINE double magnitude(const float *x, size_t n) {
    float lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += fabsf(x[i + j]);
    for (int j = 0; i < n; i++, j++) lanes[j] += fabsf(x[i]);
    return total(lanes);
}

/* The lower triangle of the Gram matrix of k operands, row by row. */
FOR_EVERY_PROCESSOR
void weft_gram(size_t k, const Operand *x, size_t n, double *out) {
    float tiles[MOST][TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE, number = 0;
        for (size_t i = 0; i < k; i++) {
            take(tiles[i], &x[i], at, m);
            for (size_t j = 0; j <= i; j++) out[number++] += dot(tiles[i], tiles[j], m);
        }
    }
}

/* Operands widened, and subtracted. */
FOR_EVERY_PROCESSOR
void weft_widen(const Operand *x, size_t n, float *out) {
    for (size_t at = 0; at < n; at += TILE)
        take(out + at, x, at, n - at < TILE ? n - at : TILE);
}

/* x.values − x.less into `out`, and rounded to bfloat16 into `rough`, where these are not NULL. Added to
 * `sums`: its square, its product with x.less, and the square of that. */
FOR_EVERY_PROCESSOR
void weft_difference(const Operand *x, size_t n, float *out, uint16_t *rough, double *sums) {
    float apart[TILE], base[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE;
        load(apart, x->values, x->kind, at, m);
        load(base, x->less, x->less_kind, at, m);
        for (size_t i = 0; i < m; i++) apart[i] -= base[i];
        sums[0] += dot(apart, apart, m);
        sums[1] += dot(apart, base, m);
        sums[2] += dot(base, base, m);
        if (out) memcpy(out + at, apart, 4 * m);
        if (rough) store(apart, rough, BFLOAT16, at, m);
    }
}

/* ------------------------------------------------------------------------------------ proofs */

/* Round a tile, and compare it with the base W: value = W + delta, delta may be known better than
 * from the difference. Against `exact` the error is that of rounding alone. */
INLINE void prove(float *restrict value, const float *restrict base, const float *restrict delta,
                  void *out, int kind, size_t at, size_t n, int exact, Proof *proof) {
    float apart[TILE], error[TILE];
    int32_t changed = 0, not_finite = 0;
    if (!base) {
        store(value, out, kind, at, n);
        for (size_t i = 0; i < n; i++) not_finite |= !(fabsf(value[i]) <= 0x1.fffffep+127f);
        proof->not_finite |= not_finite;
        return;
    }
    if (!delta) {
        for (size_t i = 0; i < n; i++) apart[i] = value[i] - base[i];
        delta = apart;
    }
    if (exact)
        for (size_t i = 0; i < n; i++) error[i] = value[i];
    store(value, out, kind, at, n);
    for (size_t i = 0; i < n; i++) changed |= value[i] != base[i];
    for (size_t i = 0; i < n; i++) not_finite |= !(fabsf(value[i]) <= 0x1.fffffep+127f);
    if (exact)
        for (size_t i = 0; i < n; i++) error[i] = value[i] - error[i];
    else
        for (size_t i = 0; i < n; i++) error[i] = value[i] - base[i] - delta[i];
    proof->base += dot(base, base, n);
    proof->delta += dot(delta, delta, n);
    proof->error += dot(error, error, n);
    proof->changed |= changed;
    proof->not_finite |= not_finite;
}

/* `value`, or W + delta where that is NULL, rounded into `out`. */
FOR_EVERY_PROCESSOR
void weft_finish(const float *value, const Operand *base, const float *delta, size_t n, int exact,
                 void *out, int kind, Proof *proof) {
    float tile[TILE], weights[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE;
        if (base) take(weights, base, at, m);
        if (value)
            memcpy(tile, value + at, 4 * m);
        else
            for (size_t i = 0; i < m; i++) tile[i] = weights[i] + delta[at + i];
        prove(tile, base ? weights : NULL, delta ? delta + at : NULL, out, kind, at, m, exact,
              proof);
    }
}

/* Σ factors[i] x[i] + share · W, rounded into `out`. */
FOR_EVERY_PROCESSOR
void weft_combine(size_t k, const Operand *x, const float *factors, const Operand *base,
                  float share, size_t n, void *out, int kind, Proof *proof) {
    float tile[TILE], more[TILE], weights[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE;
        for (size_t i = 0; i < k; i++) {
            take(more, &x[i], at, m);
            if (i)
                for (size_t e = 0; e < m; e++) tile[e] += factors[i] * more[e];
            else
                for (size_t e = 0; e < m; e++) tile[e] = factors[0] * more[e];
        }
        if (base) {
            take(weights, base, at, m);
            if (share != 0)
                for (size_t e = 0; e < m; e++) tile[e] += share * weights[e];
        }
        prove(tile, base ? weights : NULL, NULL, out, kind, at, m, 1, proof);
    }
}

/* --------------------------------------------------------------------------------- selections */

/* Which elements of a task vector d are kept: low < |d| ≤ high, and those whose bit is set, counted
 * from `first` on, the highest of a byte before the others. */
typedef struct {
    const uint8_t *bits;
    size_t first;
    float low, high;
} Keep;

/* 0 or 1 for n bits from bit `first` on; up to 7 more are written. */
INLINE void unpack(float *restrict out, const uint8_t *restrict bits, size_t first, size_t n) {
    int skip = first % 8;
    bits += first / 8;
    for (size_t i = 0; i < n; i += 8) {
        /* The byte after the last is not there. */
        uint32_t more = skip && i + 8 - skip < n ? bits[i / 8 + 1] : 0;
        uint32_t byte = ((uint32_t)bits[i / 8] << 8 | more) << skip;
        for (int j = 0; j < 8; j++) out[i + j] = (float)((byte >> (15 - j)) & 1);
    }
}

/* NaN or infinity times 0 is NaN, and is found out. */
INLINE void keep(float *restrict d, const Keep *which, size_t at, size_t n) {
    if (which->low >= 0)
        for (size_t i = 0; i < n; i++) d[i] = fabsf(d[i]) <= which->low ? 0 : d[i];
    if (which->high < INFINITY)
        for (size_t i = 0; i < n; i++) d[i] *= fabsf(d[i]) <= which->high ? 1.0f : 0.0f;
    if (which->bits) {
        float kept[TILE + 8];
        unpack(kept, which->bits, which->first + at, n);
        for (size_t i = 0; i < n; i++) d[i] *= kept[i];
    }
}

/* Σ |d| of all, and of what is kept. */
FOR_EVERY_PROCESSOR
void weft_norms(const Operand *x, const Keep *which, size_t n, double *out) {
    float d[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE;
        take(d, x, at, m);
        out[0] += magnitude(d, m);
        keep(d, which, at, m);
        out[1] += magnitude(d, m);
    }
}

/* W + scale · m, m the sum of e[i] = factors[i] · kept d[i]; with `vote` of those alone whose sign
 * is that of the sum of all, with `weights` divided by the sum of the weights that count. */
FOR_EVERY_PROCESSOR
void weft_vote(size_t k, const Operand *x, const Keep *which, const float *factors,
               const float *weights, float scale, int vote, const Operand *base, size_t n, void *out,
               int kind, Proof *proof) {
    float e[MOST][TILE], sum[TILE], share[TILE], W[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE;
        for (size_t i = 0; i < k; i++) {
            take(e[i], &x[i], at, m);
            keep(e[i], &which[i], at, m);
            for (size_t j = 0; j < m; j++) e[i][j] *= factors[i];
            if (i)
                for (size_t j = 0; j < m; j++) sum[j] += e[i][j];
            else
                memcpy(sum, e[0], sizeof sum); /* and not 0 + −0 */
        }
        take(W, base, at, m);
        if (vote) {
            float sign[TILE];
            for (size_t j = 0; j < m; j++) sign[j] = sum[j] >= 0 ? 1.0f : -1.0f;
            memset(sum, 0, sizeof sum);
            memset(share, 0, sizeof share);
            for (size_t i = 0; i < k; i++) {
                float weight = weights ? weights[i] : 0;
                for (size_t j = 0; j < m; j++) {
                    float own = e[i][j] * sign[j];
                    sum[j] += own <= 0 ? 0 : own; /* and NaN */
                    share[j] += own > 0 ? weight : 0;
                }
            }
            if (weights)
                for (size_t j = 0; j < m; j++) sum[j] /= share[j] + (float)(share[j] == 0);
            for (size_t j = 0; j < m; j++) sum[j] *= sign[j];
        }
        for (size_t j = 0; j < m; j++) sum[j] = sum[j] * scale + W[j];
        prove(sum, W, NULL, out, kind, at, m, 1, proof);
    }
}

/* Those of n keys with low ≤ key ≤ high into `out`, in their order; -> how many these are, and how
 * many are above. */
FOR_EVERY_PROCESSOR
void weft_between(const float *keys, size_t n, float low, float high, float *out, size_t *counts) {
    size_t inside = 0, above = 0;
    for (size_t at = 0; at < n; at += TILE) {
        const float *tile = keys + at;
        size_t m = n - at < TILE ? n - at : TILE;
        uint8_t found[TILE] = {0};
        int32_t over = 0;
#pragma omp simd reduction(+ : over)
        for (size_t j = 0; j < m; j++) over += tile[j] > high;
        for (size_t j = 0; j < m; j++) found[j] = (tile[j] >= low) & (tile[j] <= high);
        above += over;
        for (size_t j = 0; j < m; j += 8) {
            uint64_t any; /* of eight, mostly none */
            memcpy(&any, found + j, 8);
            for (size_t i = j; any && i < j + 8; i++)
                if (found[i]) out[inside++] = tile[i];
        }
    }
    counts[0] = inside;
    counts[1] = above;
}

/* ------------------------------------------------------------------------------------ numbers */

INLINE uint64_t multiply(uint64_t a, uint64_t b, uint64_t *high) {
    unsigned __int128 product = (unsigned __int128)a * b;
    *high = (uint64_t)(product >> 64);
    return (uint64_t)product;
}

/* The raw stream of NumPy's Philox4x64-10 (Salmon et al., 2011): n times four words, behind
 * `counter`. */
void weft_philox(uint64_t key, uint64_t more, uint64_t counter, size_t n, uint64_t *out) {
    for (size_t i = 0; i < n; i++) {
        uint64_t a = counter + 1 + i, b = 0, c = 0, d = 0, k0 = key, k1 = more;
        for (int round = 0; round < 10; round++) {
            uint64_t high0, high1;
            uint64_t low0 = multiply(0xD2E7470EE14C6C93u, a, &high0);
            uint64_t low1 = multiply(0xCA5A826395121157u, c, &high1);
            a = high1 ^ b ^ k0;
            b = low1;
            c = high0 ^ d ^ k1;
            d = low0;
            k0 += 0x9E3779B97F4A7C15u;
            k1 += 0xBB67AE8584CAA73Bu;
        }
        out[4 * i] = a;
        out[4 * i + 1] = b;
        out[4 * i + 2] = c;
        out[4 * i + 3] = d;
    }
}
