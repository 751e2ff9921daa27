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
    return vec2(exp2(x * LOG2_E), derivative);
}
