// Invalid arguments of fprop, dgrad and wgrad are rejected with a message that names them, before anything is
// written.
#include <cmath>
#include <cstring>

#include "op_case.h"

namespace {

// All arguments of dcgan_fprop and dcgan_dgrad: valid until a case invalidates one.
struct Call {
    dcgan_op op;
    int64_t images;
    const float *x, *weight, *dy, *saved_y;  // saved_y: y of the forward pass
    const int64_t* strides;
    float *y, *mean, *variance, *dx, *dcenter, *dscale, *dshift;
    int threads = 1;
};

struct InvalidArgument {
    const char* names;  // must occur in the error message
    std::function<void(Call&)> invalidate;
};

const float NUMBERS[64] = {};

const InvalidArgument OP[] = {
    {"transposed", [](Call& c) { c.op.transposed = 2; }},
    {"c_in", [](Call& c) { c.op.c_in = 0; }},
    {"c_in", [](Call& c) { c.op.c_in = 65537; }},
    {"c_out", [](Call& c) { c.op.c_out = -1; }},
    {"height", [](Call& c) { c.op.height = 0; }},
    {"width", [](Call& c) { c.op.width = 16385; }},
    {"map", [](Call& c) { c.op.height = 1; }},
    {"kernel", [](Call& c) { c.op.kernel = 3; }},
    {"stride", [](Call& c) { c.op.stride = 1; }},
    {"padding", [](Call& c) { c.op.padding = 0; }},
    {"algorithm", [](Call& c) { c.op.algorithm = -1; }},
    {"algorithm", [](Call& c) { c.op.algorithm = 5; }},
    {"in_act", [](Call& c) { c.op.in_act = -1; }},
    {"in_act", [](Call& c) { c.op.in_act = DCGAN_TANH; }},
    {"in_act", [](Call& c) { c.op.in_act = DCGAN_SIGMOID; }},
    {"act", [](Call& c) { c.op.statistics = 0, c.op.out_act = -1; }},
    {"act", [](Call& c) { c.op.statistics = 0, c.op.out_act = 5; }},
    {"slope", [](Call& c) { c.op.slope = -0.1f; }},
    {"slope", [](Call& c) { c.op.slope = std::nanf(""); }},
    {"center", [](Call& c) { c.op.center = nullptr; }},
    {"scale", [](Call& c) { c.op.scale = nullptr; }},
    {"shift", [](Call& c) { c.op.shift = nullptr; }},
    {"statistics", [](Call& c) { c.op.out_act = DCGAN_RELU; }},
    {"out_scale", [](Call& c) { c.op.out_scale = NUMBERS; }},
    {"out_shift", [](Call& c) { c.op.out_shift = NUMBERS; }},
};
const InvalidArgument BOTH[] = {
    {"images", [](Call& c) { c.images = -1; }},
    {"images", [](Call& c) { c.images = (int64_t{1} << 28) + 1; }},
    {"threads", [](Call& c) { c.threads = 0; }},
    {"threads", [](Call& c) { c.threads = -2; }},
    {"threads", [](Call& c) { c.threads = 5000; }},
    {"weight", [](Call& c) { c.weight = nullptr; }},
    {"strides", [](Call& c) { c.strides = nullptr; }},
};
const InvalidArgument FPROP[] = {
    {"x is null", [](Call& c) { c.x = nullptr; }},
    {"y is null", [](Call& c) { c.y = nullptr; }},
    {"mean is null", [](Call& c) { c.mean = nullptr; }},
    {"variance is null", [](Call& c) { c.variance = nullptr; }},
};
const InvalidArgument DGRAD[] = {
    {"dy is null", [](Call& c) { c.dy = nullptr; }},
    {"dx is null", [](Call& c) { c.dx = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr, c.op.dmean = nullptr; }},
    {"y is null", [](Call& c) { c.saved_y = nullptr, c.op.statistics = 0, c.op.out_act = DCGAN_TANH; }},
    {"mean is null", [](Call& c) { c.op.mean = nullptr; }},
    {"x is null", [](Call& c) { c.x = nullptr; }},
    {"x is null",
     [](Call& c) {
         c.x = nullptr;
         c.op.center = c.op.scale = c.op.shift = nullptr;
         c.dcenter = c.dscale = c.dshift = nullptr;
     }},
    {"dcenter", [](Call& c) { c.dcenter = nullptr; }},
    {"dscale", [](Call& c) { c.dscale = nullptr; }},
    {"dshift", [](Call& c) { c.dshift = nullptr; }},
    {"dcenter", [](Call& c) { c.op.center = c.op.scale = c.op.shift = nullptr; }},
};

}  // namespace

void test_training_arguments() {
    Random random(15);
    long cases = 0;
    const OpCase shared_case = example(random, false);
    const OpCase& c = shared_case;
    const Tensor y = Tensor::output(Layout::NHWC, c.images, c.op.c_out, c.out.height, c.out.width);
    const Tensor dx = Tensor::output(Layout::NHWC, c.images, c.op.c_in, c.in.height, c.in.width);
    const Tensor mean = vector_of(c.op.c_out), variance = vector_of(c.op.c_out);
    const Tensor dcenter = vector_of(c.op.c_in), dscale = vector_of(c.op.c_in), dshift = vector_of(c.op.c_in);
    const auto valid = [&] {
        return Call{c.op,     c.images,         c.x.data,    c.weight.data, c.dy.data,
                    c.y.data, c.weight.strides, y.data,      mean.data,     variance.data,
                    dx.data,  dcenter.data,     dscale.data, dshift.data};
    };
    const auto call_fprop = [](const Call& a) {
        return dcgan_fprop(&a.op, a.images, a.x, a.weight, a.strides, a.y, a.mean, a.variance, a.threads);
    };
    const auto call_dgrad = [](const Call& a) {
        return dcgan_dgrad(&a.op, a.images, a.dy, a.saved_y, a.weight, a.strides, a.x, a.dx, a.dcenter,
                           a.dscale, a.dshift, a.threads);
    };
    const auto untouched = [&](const char* names) {
        for (const Tensor* t : {&y, &dx, &mean, &variance, &dcenter, &dscale, &dshift})
            require(t->untouched(), "a call with an invalid %s writes", names);
        ++cases;
    };
    const auto check = [&](const InvalidArgument& invalid, bool of_op, bool of_fprop, bool of_dgrad) {
        Call a = valid();
        invalid.invalidate(a);
        if (of_op) {
            expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, DCGAN_FPROP), invalid.names);
            expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, DCGAN_DGRAD), invalid.names);
        }
        if (of_fprop) expect_rejected("dcgan_fprop", call_fprop(a), invalid.names);
        if (of_dgrad) expect_rejected("dcgan_dgrad", call_dgrad(a), invalid.names);
        untouched(invalid.names);
    };
    for (const InvalidArgument& invalid : OP) check(invalid, true, true, true);
    for (const InvalidArgument& invalid : BOTH) check(invalid, false, true, true);
    for (const InvalidArgument& invalid : FPROP) check(invalid, false, true, false);
    for (const InvalidArgument& invalid : DGRAD) check(invalid, false, false, true);

    Call a = valid();
    expect_rejected("dcgan_fprop",
                    dcgan_fprop(nullptr, 1, a.x, a.weight, a.strides, a.y, a.mean, a.variance, 1), "op");
    expect_rejected("dcgan_dgrad",
                    dcgan_dgrad(nullptr, 1, a.dy, a.saved_y, a.weight, a.strides, a.x, a.dx, a.dcenter,
                                a.dscale, a.dshift, 1),
                    "op");
    expect_rejected("dcgan_op_supports", dcgan_op_supports(nullptr, DCGAN_FPROP), "op");
    for (const int product : {-1, 3})
        expect_rejected("dcgan_op_supports", dcgan_op_supports(&a.op, product), "product");
    a.op.algorithm = DCGAN_NARROW;
    expect_rejected("dcgan_dgrad", call_dgrad(a), "narrow");
    a.op.transposed = 1;
    expect_rejected("dcgan_fprop", call_fprop(a), "narrow");
    untouched("algorithm");
    // Zero images are valid, and a no-op.
    a = valid();
    a.images = 0;
    require(call_fprop(a) == 0 && call_dgrad(a) == 0, "zero images: %s", dcgan_error());
    untouched("number of images");
    {  // A workspace that cannot be allocated is rejected before anything is read.
        Call b = valid();
        b.op.transposed = 1, b.op.algorithm = DCGAN_DIRECT;
        b.op.c_in = b.op.c_out = 65536;
        b.op.height = b.op.width = 8192;
        b.threads = 1024;
        for (const int code : {call_fprop(b), call_dgrad(b)}) {
            require(code == DCGAN_EMEMORY, "a workspace of terabytes: %d: %s", code, dcgan_error());
            require(std::strstr(dcgan_error(), "workspace") != nullptr,
                    "that error does not name the workspace: %s", dcgan_error());
        }
        untouched("size");
    }
    // Without the optional pointers.
    a = valid();
    a.op.dmean = a.op.dvariance = a.op.mean = nullptr;
    a.saved_y = nullptr;
    a.dcenter = a.dscale = a.dshift = nullptr;
    require(call_fprop(a) == 0 && call_dgrad(a) == 0, "valid arguments: %s", dcgan_error());
    report("training arguments: %ld invalid cases rejected", cases);
}

void test_wgrad_arguments() {
    Random random(12);
    OpCase c(random, false, 4, 2, 1, 5, 6, {6, 8}, 2);
    c.with_epilogue(random, DCGAN_TANH, true);
    c.op.algorithm = DCGAN_F4;
    const Tensor dweight = Tensor::output(Layout::NCHW, 6, 5, 4, 4);
    const Tensor sums = vector_of(6);
    struct Call {
        dcgan_op op;
        int64_t images;
        const float *x, *dy, *y, *weight;
        const int64_t* strides;
        int threads;
        float* dout_shift;
    };
    const auto valid = [&] {
        return Call{c.op, 2, c.x.data, c.dy.data, c.y.data, c.weight.data, c.weight.strides, 1, sums.data};
    };
    const auto wgrad = [&](const Call& a) {
        return dcgan_wgrad(&a.op, a.images, a.x, a.dy, a.y, dweight.data, dweight.strides, a.weight,
                           a.strides, sums.data, a.threads);
    };
    const auto shift = [](const Call& a) {
        return dcgan_shift_gradient(&a.op, a.images, a.dy, a.y, a.dout_shift, a.threads);
    };
    const struct {
        const char* names;  // must occur in the error message
        bool of_wgrad, of_shift;
        std::function<void(Call&)> invalidate;
    } invalid[] = {
        {"statistics", true, true,
         [](Call& a) { a.op.statistics = 1, a.op.out_act = DCGAN_NONE, a.op.out_scale = nullptr; }},
        {"weight is null", true, false, [](Call& a) { a.weight = nullptr; }},
        {"weight_strides is null", true, false, [](Call& a) { a.strides = nullptr; }},
        {"dout_shift is null", false, true, [](Call& a) { a.dout_shift = nullptr; }},
        {"dy is null", true, true, [](Call& a) { a.dy = nullptr; }},
        {"y is null", true, true, [](Call& a) { a.y = nullptr; }},
        {"c_out", true, true, [](Call& a) { a.op.c_out = 0; }},
        {"images", true, true, [](Call& a) { a.images = -1; }},
        {"threads", true, true, [](Call& a) { a.threads = 0; }},
    };
    long cases = 0;
    for (const auto& w : invalid) {
        Call a = valid();
        w.invalidate(a);
        for (const bool of_shift : {false, true}) {
            if (!(of_shift ? w.of_shift : w.of_wgrad)) continue;
            if (of_shift)
                expect_rejected("dcgan_shift_gradient", shift(a), w.names);
            else
                expect_rejected("dcgan_wgrad", wgrad(a), w.names);
            ++cases;
        }
        require(dweight.untouched() && sums.untouched(), "a call with an invalid %s writes", w.names);
    }
    require(dcgan_shift_gradient(nullptr, 1, c.dy.data, c.y.data, sums.data, 1) == DCGAN_EARGUMENT,
            "dcgan_shift_gradient accepts a null op");
    Call none = valid();
    none.images = 0;
    require(wgrad(none) == 0 && shift(none) == 0 && sums.untouched(), "zero images: %s", dcgan_error());
    require(wgrad(valid()) == 0 && shift(valid()) == 0, "valid arguments: %s", dcgan_error());
    report("wgrad arguments: %ld invalid cases rejected", cases);
}
