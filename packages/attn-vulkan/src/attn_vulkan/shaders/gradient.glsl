// What both backward shaders compute from a score.

// From q k of query i and key j: the weight, and what a gradient of the score is multiplied by.
vec2 weight(Sequence s, uint head, uint i, uint j, float product, float lse, float slope) {
    if (!is_visible(s, i, j) || !(lse > LOWEST))
        return vec2(0.0);
    float derivative = p.softmax_scale;
    float x;  // score - lse, rounded as late as can be: its error becomes the weight's relative one
    if (HAS_CAP) {
        float y = capped(product * p.scale);
        derivative *= 1.0 - y * y;
        x = fma(p.cap * LN_2, y, -lse);
    } else {
        x = fma(product, p.softmax_scale, -lse);
    }
    if (HAS_BIAS || HAS_SLOPES)
        x += added(s, head, i, j, slope, HAS_SLOPES, HAS_BIAS);
    x = max(x, LOWEST);  // a bias may be -inf
    // What x log2(e) loses where it is rounded comes back: exp2(y + z) = exp2(y) (1 + z ln 2).
    precise float y = x * LOG2_E;
    precise float z = fma(x, LOG2_E, -y) + x * LOG2_E_LOW;
    float w = exp2(y);
    return vec2(fma(w, z * LN_2, w), derivative);
}
