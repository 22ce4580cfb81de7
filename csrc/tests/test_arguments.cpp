// Invalid arguments are rejected with a negative code and a message that names them, before anything is
// written.
#include <functional>

#include "support.h"

namespace {

// All arguments of dcgan_run and dcgan_pack: valid until a case invalidates one.
struct Call {
    dcgan_layer layers[65];
    int count = 2;
    int64_t images = 2;
    dcgan_tensor x, y;
    const dcgan_tensor* x_at = &x;
    const dcgan_tensor* y_at = &y;
    int threads = 1;
    const float* weight;
    const int64_t* strides;
    float* packed;
};

using Mutation = std::function<void(Call&)>;

struct Case {
    const char* names;  // must occur in the error message
    Mutation invalidate;
};

// Invalid geometry of the first layer. All functions that take a layer reject it.
const Case GEOMETRY[] = {
    {"transposed", [](Call& c) { c.layers[0].transposed = 2; }},
    {"transposed", [](Call& c) { c.layers[0].transposed = -1; }},
    {"c_in", [](Call& c) { c.layers[0].c_in = 0; }},
    {"c_in", [](Call& c) { c.layers[0].c_in = -3; }},
    {"c_in", [](Call& c) { c.layers[0].c_in = 65537; }},
    {"c_out", [](Call& c) { c.layers[0].c_out = 0; }},
    {"c_out", [](Call& c) { c.layers[0].c_out = 65537; }},
    {"height", [](Call& c) { c.layers[0].height = 0; }},
    {"height", [](Call& c) { c.layers[0].height = 16385; }},
    {"width", [](Call& c) { c.layers[0].width = -1; }},
    {"width", [](Call& c) { c.layers[0].width = 16385; }},
    {"act", [](Call& c) { c.layers[0].act = -1; }},
    {"act", [](Call& c) { c.layers[0].act = 5; }},
    {"algorithm", [](Call& c) { c.layers[0].algorithm = -1; }},
    {"algorithm", [](Call& c) { c.layers[0].algorithm = 5; }},
    {"kernel", [](Call& c) { c.layers[0].kernel = 3; }},
    {"stride", [](Call& c) { c.layers[0].stride = 1; }},
    {"padding", [](Call& c) { c.layers[0].padding = 0; }},
    {"map", [](Call& c) { c.layers[0].transposed = 0, c.layers[0].height = 1; }},
    {"map", [](Call& c) { c.layers[0].transposed = 0, c.layers[0].width = 1; }},
};

void dense(dcgan_layer& l, int transposed, int kernel, int stride, int padding, int side) {
    l.algorithm = DCGAN_DENSE;
    l.transposed = transposed;
    l.kernel = kernel, l.stride = stride, l.padding = padding;
    l.height = l.width = side;
}

const Case DENSE_GEOMETRY[] = {
    {"kernel", [](Call& c) { dense(c.layers[0], 1, 0, 1, 0, 1); }},
    {"kernel", [](Call& c) { dense(c.layers[0], 1, 65, 1, 0, 1); }},
    {"stride", [](Call& c) { dense(c.layers[0], 1, 4, 0, 0, 1); }},
    {"padding", [](Call& c) { dense(c.layers[0], 1, 4, 1, 1, 1); }},
    {"map", [](Call& c) { dense(c.layers[0], 1, 4, 1, 0, 2); }},
    {"map", [](Call& c) { dense(c.layers[0], 0, 4, 1, 0, 1); }},
    {"map", [](Call& c) { dense(c.layers[0], 0, 4, 1, 0, 5); }},
};

const Case CHAIN[] = {
    {"count", [](Call& c) { c.count = 0; }},
    {"count", [](Call& c) { c.count = -1; }},
    {"count", [](Call& c) { c.count = 65; }},
    {"images", [](Call& c) { c.images = -1; }},
    {"images", [](Call& c) { c.images = (int64_t{1} << 28) + 1; }},
    {"threads", [](Call& c) { c.threads = 0; }},
    {"threads", [](Call& c) { c.threads = -2; }},
    {"threads", [](Call& c) { c.threads = 5000; }},
    {"layer 1 takes", [](Call& c) { c.layers[1].c_in += 1; }},
    {"layer 1 takes", [](Call& c) { c.layers[1].height += 1; }},
    {"layer 1 takes", [](Call& c) { c.layers[1].width -= 1; }},
    {"act", [](Call& c) { c.layers[1].act = 7; }},
};

const Case RUN[] = {
    {"x ", [](Call& c) { c.x_at = nullptr; }},
    {"x ", [](Call& c) { c.x.data = nullptr; }},
    {"x ", [](Call& c) { c.x.strides[0] = -c.x.strides[0]; }},
    {"x ", [](Call& c) { c.x.strides[1] = -1; }},
    {"x ", [](Call& c) { c.x.strides[2] = -c.x.strides[2]; }},
    {"x ", [](Call& c) { c.x.strides[3] = -c.x.strides[3]; }},
    {"x ", [](Call& c) { c.x.strides[1] = 2; }},
    {"y ", [](Call& c) { c.y_at = nullptr; }},
    {"y ", [](Call& c) { c.y.data = nullptr; }},
    {"y ", [](Call& c) { c.y.strides[0] = -c.y.strides[0]; }},
    {"y ", [](Call& c) { c.y.strides[1] = -1; }},
    {"y ", [](Call& c) { c.y.strides[2] = -c.y.strides[2]; }},
    {"y ", [](Call& c) { c.y.strides[3] = -c.y.strides[3]; }},
    {"y ", [](Call& c) { c.y.strides[1] = 2; }},
    {"layer 0", [](Call& c) { c.layers[0].weights = nullptr; }},
    {"layer 1", [](Call& c) { c.layers[1].weights = nullptr; }},
    {"layer 0 has only one of mean and variance", [](Call& c) { c.layers[0].variance = nullptr; }},
    {"layer 1 has only one of mean and variance", [](Call& c) { c.layers[1].mean = nullptr; }},
};

}  // namespace

void test_arguments() {
    Random random(11);
    long cases = 0;
    Layer first(random, true, 4, 2, 1, 5, 6, 3, 4), second(random, false, 4, 2, 1, 6, 7, 6, 8);
    first.affine(random, true, true, true, true);
    second.affine(random, true, true, true);
    first.pack(DCGAN_DIRECT);
    second.pack(DCGAN_F2);
    const Tensor x = Tensor::random(random, Layout::NHWC, 2, 5, 3, 4);
    const Tensor y = Tensor::output(Layout::NHWC, 2, 7, 3, 4);
    const Tensor packed = Tensor::output(Layout::NHWC, 1, 1, 1, dcgan_packed_size(&first.l));

    const auto make_valid = [&](Call& c) {
        for (dcgan_layer& l : c.layers) l = second.l;
        c.layers[0] = first.l;
        c.x = x.view();
        c.y = y.view();
        c.weight = first.weight.data;
        c.strides = first.weight.strides;
        c.packed = packed.data;
    };
    const auto call_run = [](const Call& c) {
        return dcgan_run(c.layers, c.count, c.images, c.x_at, c.y_at, c.threads);
    };
    const auto call_pack = [](const Call& c) {
        return dcgan_pack(c.layers, c.weight, c.strides, c.packed, c.threads);
    };
    const auto call_workspace = [](const Call& c) {
        return dcgan_workspace(c.layers, c.count, c.images, c.threads);
    };
    const auto untouched = [&](const char* names) {
        require(y.untouched() && packed.untouched(), "a call with an invalid %s writes", names);
        ++cases;
    };

    const auto geometry = [&](const Case& invalid) {
        Call c;
        make_valid(c);
        invalid.invalidate(c);
        expect_rejected("dcgan_supports", dcgan_supports(c.layers), invalid.names);
        expect_rejected("dcgan_packed_size", dcgan_packed_size(c.layers), invalid.names);
        expect_rejected("dcgan_pack", call_pack(c), invalid.names);
        expect_rejected("dcgan_run", call_run(c), invalid.names);
        expect_rejected("dcgan_workspace", call_workspace(c), invalid.names);
        untouched(invalid.names);
    };
    for (const Case& invalid : GEOMETRY) geometry(invalid);
    for (const Case& invalid : DENSE_GEOMETRY) geometry(invalid);
    for (const Case& invalid : CHAIN) {
        Call c;
        make_valid(c);
        invalid.invalidate(c);
        expect_rejected("dcgan_run", call_run(c), invalid.names);
        expect_rejected("dcgan_workspace", call_workspace(c), invalid.names);
        untouched(invalid.names);
    }
    for (const Case& invalid : RUN) {
        Call c;
        make_valid(c);
        invalid.invalidate(c);
        expect_rejected("dcgan_run", call_run(c), invalid.names);
        untouched(invalid.names);
    }
    {
        Call c;
        make_valid(c);
        expect_rejected("dcgan_run", dcgan_run(nullptr, 1, 1, &c.x, &c.y, 1), "layers");
        expect_rejected("dcgan_workspace", dcgan_workspace(nullptr, 1, 1, 1), "layers");
        expect_rejected("dcgan_limit_threads", dcgan_limit_threads(-1), "limit");
        expect_rejected("dcgan_supports", dcgan_supports(nullptr), "layer");
        expect_rejected("dcgan_packed_size", dcgan_packed_size(nullptr), "layer");
        expect_rejected("dcgan_pack", dcgan_pack(nullptr, c.weight, c.strides, c.packed, 1), "layer");
        expect_rejected("dcgan_pack", dcgan_pack(c.layers, nullptr, c.strides, c.packed, 1), "weight");
        expect_rejected("dcgan_pack", dcgan_pack(c.layers, c.weight, nullptr, c.packed, 1), "strides");
        expect_rejected("dcgan_pack", dcgan_pack(c.layers, c.weight, c.strides, nullptr, 1), "packed");
        for (const int threads : {0, -1, 5000}) {
            expect_rejected("dcgan_pack", dcgan_pack(c.layers, c.weight, c.strides, c.packed, threads),
                            "threads");
            require(dcgan_peak(threads, 0.01) < 0, "dcgan_peak(%d, 0.01) is not negative", threads);
        }
        untouched("null pointer");

        // Zero images are valid, and a no-op.
        require(dcgan_run(c.layers, 2, 0, &c.x, &c.y, 1) == 0, "zero images: %s", dcgan_error());
        untouched("number of images");
    }
    {  // A workspace of hundreds of terabytes is rejected before x or y are accessed.
        Call c;
        make_valid(c);
        dcgan_layer& l = c.layers[0];
        l.algorithm = DCGAN_NARROW;
        l.c_out = 65536;
        l.height = l.width = 16384;
        require(dcgan_supports(&l) == 0, "the largest layer: %s", dcgan_error());
        c.count = 1;
        c.threads = 1024;
        expect_rejected("dcgan_run", call_run(c), "workspace", DCGAN_EMEMORY);
        untouched("size");
    }
    {  // With and without the optional pointers.
        Call c;
        make_valid(c);
        require(call_run(c) == 0, "valid arguments: %s", dcgan_error());
        dcgan_layer& l = c.layers[0];
        l.bias = l.scale = l.shift = l.mean = l.variance = nullptr;
        require(call_run(c) == 0, "valid arguments: %s", dcgan_error());
    }
    const std::string before = dcgan_isa();
    expect_rejected("dcgan_use_isa", dcgan_use_isa(nullptr), "name");
    expect_rejected("dcgan_use_isa", dcgan_use_isa("sse9"), "sse9", DCGAN_EISA);
    expect_rejected("dcgan_use_isa", dcgan_use_isa(""), "instruction set", DCGAN_EISA);
    cases += 3;
    for (const std::string& isa : split(dcgan_built())) {
        bool supported = false;
        for (const std::string& other : isas()) supported |= other == isa;
        if (supported) continue;
        expect_rejected("dcgan_use_isa", dcgan_use_isa(isa.c_str()), isa.c_str(), DCGAN_EISA);
        ++cases;
    }
    require(dcgan_isa() == before, "after a rejected dcgan_use_isa the instruction set is %s, not %s",
            dcgan_isa(), before.c_str());
    for (const std::string& isa : isas())
        require(dcgan_use_isa(isa.c_str()) == 0 && dcgan_isa() == isa, "dcgan_use_isa(%s): %s", isa.c_str(),
                dcgan_error());
    report("arguments: %ld invalid cases rejected", cases);
}
