"""Exercise: classifier-free guidance.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py cfg
"""


def cfg(model, y, null, scale, interval=(0, 1)):
    """A velocity under classifier-free guidance.

        v_null + scale (v - v_null)         v under condition y, v_null under the null condition

    In training, the condition of some samples is replaced by the null condition, "any image". So
    one model also learns the velocity v_null towards images of all kinds, and v - v_null is what
    the condition changes. A scale above 1 exaggerates that change: images fit their condition
    better, and differ less from each other.

    Guidance acts on the samples whose t is in the interval, both ends included. The others get v.

    model: function (x b c h w, t b, y) -> velocity b c h w.
    y: condition of each sample: class ids b, or text b n d.
    null: the null condition in a shape that broadcasts to y, a tensor or a number: for class ids b
    or a number, for text d or n d. The model needs it in the shape of y.
    scale: 1 gives v itself. interval: two times in [0,1].
    Returns: function (x b c h w, t b) -> guided velocity b c h w, as euler and heun take it.
    Source: arXiv 2207.12598; the interval: 2404.07724. Lines of the solution: 17.
    8 give the same velocity. The others only save time: they run both conditions in one batch, and
    skip the null condition where no sample needs it.
    """
    raise NotImplementedError("your code here")
