//! What holds for every plan: each tensor is on all devices, or cut so that each element is on one.

use proptest::prelude::*;
use tightfit_guest::{Format, Policy, Request, SlicedProposal, Tensor};

use crate::TensorParallel;
use crate::fixtures::{request, tensor};

/// How many devices have a tensor, and the shares of what is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Held {
    Everywhere,
    One(usize),
    /// Along this dimension, so much of it on each device.
    Cut(u32, Vec<u64>),
}

/// Looks at what became of each tensor.
///
/// # Panics
/// When it is neither on all devices nor cut disjointly and completely.
pub(crate) fn held(request: &Request, proposal: &SlicedProposal) -> Vec<Held> {
    let devices = request.devices.len();
    assert_eq!(proposal.placements.len(), request.tensors.len());
    assert_eq!(proposal.headroom.len(), devices);
    let of = |(t, tensor): (usize, &Tensor)| {
        let slices = proposal
            .slices
            .iter()
            .filter(|slice| slice.tensor as usize == t);
        let slices: Vec<_> = slices.collect();
        let own = proposal.placements[t].device;
        if slices.is_empty() {
            return Held::One(own.expect("it is loaded") as usize);
        }
        assert_eq!(own, None, "{} is whole and in slices", tensor.name);
        let on: Vec<u32> = slices.iter().map(|s| s.placement.device.unwrap()).collect();
        assert!(
            on.iter().copied().eq(0..devices as u32),
            "{}: {on:?}",
            tensor.name
        );
        let format = proposal.placements[t].format;
        assert!(slices.iter().all(|slice| slice.placement.format == format));
        let dimension = slices[0].dimension;
        assert!(slices.iter().all(|slice| slice.dimension == dimension));
        let length = tensor.shape[dimension as usize];
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for slice in &slices {
            assert!(!slice.ranges.is_empty());
            let mut before = 0;
            for range in &slice.ranges {
                assert!(before <= range.start && range.start < range.end && range.end <= length);
                before = range.end;
                covered.push((range.start, range.end));
            }
        }
        if slices
            .iter()
            .all(|slice| slice.shape(&tensor.shape) == tensor.shape)
            && devices > 1
        {
            return Held::Everywhere;
        }
        covered.sort_unstable();
        let mut end = 0;
        for (start, next) in covered {
            assert_eq!(start, end, "{} has a gap or an overlap", tensor.name);
            end = next;
        }
        assert_eq!(end, length, "{}", tensor.name);
        let share = |slice: &&tightfit_guest::Slice| slice.shape(&tensor.shape)[dimension as usize];
        Held::Cut(dimension, slices.iter().map(share).collect())
    };
    request.tensors.iter().enumerate().map(of).collect()
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let name = prop::sample::select(vec![
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.experts.1.down_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.gate_up_proj_bias",
        "model.layers.2.mlp.experts.down_proj",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "odd",
    ]);
    // Mostly such as devices can share.
    let length = prop_oneof![
        8 => prop::sample::select(vec![120u64, 240, 480, 1920]),
        1 => 0u64..400,
    ];
    let one = (name, prop::collection::vec(length, 0..4));
    prop::collection::vec(one, 1..9).prop_map(|given| {
        let mut tensors: Vec<Tensor> = given
            .iter()
            .map(|(name, shape)| tensor(*name, shape))
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors.dedup_by(|a, b| a.name == b.name);
        tensors
    })
}

fn plans() -> impl Strategy<Value = String> {
    let module = prop::sample::select(vec![
        "layers.*.self_attn.q_proj",
        "layers.*.self_attn.k_proj",
        "layers.*.self_attn.o_proj",
        "layers.*.mlp.experts.gate_up_proj",
        "layers.2.mlp.experts.down_proj",
        "layers.*.mlp.experts.down_proj",
        "layers.*.mlp.experts",
        "embed_tokens",
        "lm_head",
        "odd",
    ]);
    let style = prop::sample::select(vec![
        "colwise",
        "colwise_rep",
        "rowwise",
        "packed_colwise",
        "packed_rowwise",
        "embedding_rowwise",
        "embedding_colwise",
        "grouped_gemm",
        "moe_tp_experts",
        "replicate",
    ]);
    prop::collection::vec((module, style), 0..8).prop_map(|entries| {
        let entries: Vec<String> = entries
            .iter()
            .map(|(module, style)| format!("\"{module}\": \"{style}\""))
            .collect();
        format!("{{{}}}", entries.join(", "))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_tensor_is_on_all_devices_or_cut_disjointly_and_completely(
        tensors in tensors(),
        devices in 1usize..6,
        plan in prop::option::of(plans()),
        heads in prop::option::of(prop_oneof![
            4 => Just((120u64, 60u64)),
            1 => (1u64..9, 1u64..9),
        ]),
        whole_experts in prop::sample::select(vec!["auto", "true", "false"]),
    ) {
        let config = heads.map_or_else(|| "{}".to_owned(), |(queries, keys)| {
            format!(r#"{{"num_attention_heads": {queries}, "num_key_value_heads": {keys}}}"#)
        });
        let request = request(tensors, devices, &config).set("expert-parallel", whole_experts);
        let request = match &plan {
            Some(plan) => request.set("plan", plan),
            None => request,
        };
        let asked = request.clone();
        match TensorParallel::plan_slices(request) {
            Ok(proposal) => {
                for (held, tensor) in held(&asked, &proposal).iter().zip(&asked.tensors) {
                    let is_single = tensor.shape.first().is_none_or(|&length| length == 0);
                    match held {
                        Held::One(0) if devices == 1 || is_single => {}
                        // A whole expert.
                        Held::One(_) => prop_assert!(tensor.name.contains("experts.")),
                        Held::Everywhere => prop_assert!(devices > 1),
                        Held::Cut(_, shares) => prop_assert!(shares.iter().all(|&share| share > 0)),
                    }
                }
                let is_usual = |format| matches!(format, Format::Stored | Format::Nf4(_));
                let formats = proposal.placements.iter().map(|placement| placement.format);
                prop_assert!(formats.into_iter().all(is_usual));
            }
            Err(refusal) => prop_assert!(!refusal.message.is_empty()),
        }
    }
}
