// The value of a pair of tokens in the sum of the loss, and its weight, the derivative by the cosine or distance, for a
// float or a vector of floats F, without the factors that all pairs share. Included once per instruction set, inside a
// namespace that defines lesser, greater, magnitude, choose (by sign), inverse_root and exponential for F.

// arccos(x) / sqrt(1 - x) for 0 <= x < 1, with an error below 2e-9 / sqrt(1 - x): a polynomial fit of degree 8.
template <class F>
PAIR_INLINE F arccos_quotient(F x) {
  F p = x * 0.0008180630f - 0.0044795653f;
  p = p * x + 0.0118018047f;
  p = p * x - 0.0213423601f;
  p = p * x + 0.0328407919f;
  p = p * x - 0.0506575304f;
  p = p * x + 0.0890375541f;
  p = p * x - 0.2146014869f;
  return p * x + 1.5707963250f;
}

// The angle with cosine c, and 1 / sin(angle), for |c| < 1.
template <class F>
PAIR_INLINE void angle_of(F c, F* angle, F* inverse_sine) {
  F x = magnitude(c);
  F root = inverse_root(1.0f - x);
  F small = (1.0f - x) * root * arccos_quotient(x);
  *angle = choose(c, 3.14159265f - small, small);
  *inverse_sine = root * inverse_root(1.0f + x);
}

struct AngularSpread {  // exp((shift - angle) / (pi tau)); the derivative by c, times pi tau
  float limit, shift, inverse_pi_tau;
  template <class F>
  PAIR_INLINE void operator()(F c, F* value, F* weight) const {
    F angle, inverse_sine;
    angle_of(greater(lesser(c, limit), -limit), &angle, &inverse_sine);
    *value = exponential((shift - angle) * inverse_pi_tau);
    *weight = *value * inverse_sine;
  }
};

struct Orthogonalization {  // max(0, 1/2 - angle / pi)^2; the derivative by c, times pi / 2
  float limit;
  template <class F>
  PAIR_INLINE void operator()(F c, F* value, F* weight) const {
    F angle, inverse_sine;
    angle_of(greater(lesser(c, limit), -limit), &angle, &inverse_sine);
    F gap = choose(-c, greater(0.5f - angle * 0.318309886f, 0.0f), c * 0.0f);  // exactly 0 from a right angle on
    *value = gap * gap;
    *weight = gap * inverse_sine;
  }
};

struct Decorrelation {  // c^2; half the derivative by c
  template <class F>
  PAIR_INLINE void operator()(F c, F* value, F* weight) const {
    *value = c * c;
    *weight = c;
  }
};
