//! What fills each device, to the byte.

use serde::Serialize;
use tightfit_common::names::TensorKind;

use super::purpose;
use crate::checkpoint::TensorInfo;
use crate::plan::{DevicePlan, PartKind, Plan};

/// One kind of what fills a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// Tables that are looked up.
    Embeddings,
    /// Matrices of attention and other linear layers.
    Linear,
    /// Weights of experts.
    Experts,
    /// Norms, biases, routers, convolutions and all else.
    Other,
    /// What turns hidden states into logits or scores.
    OutputHead,
    /// Scales of quantized weights, and scales of scales.
    Scales,
    /// What alignment and the device's granularity add.
    Padding,
    /// What the policy leaves for the KV cache, activations and what the user reserves: free, or
    /// reserved as the tail.
    Headroom,
    /// What was not available when the plan was made.
    InUse,
    /// The rest.
    Free,
}

impl Content {
    /// All of them, in the order of a picture.
    pub const ALL: [Content; 10] = [
        Content::Embeddings,
        Content::Linear,
        Content::Experts,
        Content::Other,
        Content::OutputHead,
        Content::Scales,
        Content::Padding,
        Content::Headroom,
        Content::InUse,
        Content::Free,
    ];

    /// As a legend names it.
    pub const fn name(self) -> &'static str {
        match self {
            Content::Embeddings => "embeddings",
            Content::Linear => "linear layers",
            Content::Experts => "experts",
            Content::Other => "norms and others",
            Content::OutputHead => "output head",
            Content::Scales => "scales",
            Content::Padding => "padding",
            Content::Headroom => "headroom",
            Content::InUse => "in use by others",
            Content::Free => "free",
        }
    }

    /// Returns what the elements of such a tensor count as.
    pub fn of(kind: TensorKind) -> Content {
        match kind {
            TensorKind::Embedding => Content::Embeddings,
            TensorKind::Linear => Content::Linear,
            TensorKind::Expert => Content::Experts,
            TensorKind::OutputHead => Content::OutputHead,
            TensorKind::Norm
            | TensorKind::Bias
            | TensorKind::Router
            | TensorKind::Convolution
            | TensorKind::Other => Content::Other,
        }
    }
}

/// What fills one device. The fields add up to its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[allow(missing_docs, reason = "each is the `Content` of its name, in bytes")]
pub struct Fill {
    pub embeddings: u64,
    pub linear: u64,
    pub experts: u64,
    pub other: u64,
    pub output_head: u64,
    pub scales: u64,
    pub padding: u64,
    pub headroom: u64,
    pub in_use: u64,
    pub free: u64,
}

impl Fill {
    /// Returns the number of bytes of one kind.
    pub fn get(&self, content: Content) -> u64 {
        let mut fill = *self;
        *fill.part(content)
    }

    /// Returns every kind with its bytes, in the order of a picture.
    pub fn parts(&self) -> [(Content, u64); 10] {
        Content::ALL.map(|content| (content, self.get(content)))
    }

    fn part(&mut self, content: Content) -> &mut u64 {
        match content {
            Content::Embeddings => &mut self.embeddings,
            Content::Linear => &mut self.linear,
            Content::Experts => &mut self.experts,
            Content::Other => &mut self.other,
            Content::OutputHead => &mut self.output_head,
            Content::Scales => &mut self.scales,
            Content::Padding => &mut self.padding,
            Content::Headroom => &mut self.headroom,
            Content::InUse => &mut self.in_use,
            Content::Free => &mut self.free,
        }
    }
}

/// Returns what fills each device of a plan for these tensors.
pub fn fills(tensors: &[TensorInfo], plan: &Plan) -> Vec<Fill> {
    let mut fills = vec![Fill::default(); plan.devices.len()];
    for (tensor, planned) in tensors.iter().zip(&plan.tensors) {
        let Some(device) = planned.placement.device else {
            continue;
        };
        let fill = &mut fills[device as usize];
        let content = Content::of(purpose(tensor));
        for part in &planned.parts {
            *fill.part(match part.kind {
                PartKind::Data | PartKind::Codes => content,
                PartKind::Absmax | PartKind::NestedAbsmax => Content::Scales,
            }) += part.bytes;
        }
    }
    for (fill, device) in fills.iter_mut().zip(&plan.devices) {
        fill.padding = device.size.reserved - device.size.requested - device.tail;
        let rest = rest(device);
        fill.headroom = rest.headroom + device.tail;
        (fill.in_use, fill.free) = (rest.in_use, rest.free);
    }
    fills
}

/// Of what is not reserved, headroom counts first: on a device that holds nothing a policy may ask
/// for more of it than there is.
fn rest(device: &DevicePlan) -> Fill {
    let left = device.device.capacity.saturating_sub(device.size.reserved);
    let headroom = device.headroom.min(left);
    let taken = device
        .device
        .capacity
        .saturating_sub(device.device.available);
    let in_use = taken.min(left - headroom);
    Fill {
        headroom,
        in_use,
        free: left - headroom - in_use,
        ..Fill::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::samples::{device, tensor};
    use crate::types::{Format, Placement};

    #[test]
    fn every_byte_is_of_its_kind() {
        let tensors = [
            tensor("model.embed_tokens.weight", &[10, 64]),
            tensor("model.layers.0.mlp.up_proj.weight", &[64, 64]),
            tensor("model.layers.0.mlp.experts.down_proj", &[2, 64, 64]),
            tensor("model.norm.weight", &[64]),
            tensor("lm_head.weight", &[10, 64]),
            tensor("left.out.weight", &[1000]),
        ];
        let on = |device, format| Placement { device, format };
        let placements = [
            on(Some(0), Format::Stored),
            on(Some(0), Format::NF4_DOUBLE),
            on(Some(0), Format::NF4_DOUBLE),
            on(Some(0), Format::Stored),
            on(Some(0), Format::Stored),
            on(None, Format::Stored),
        ];
        let mut device = device(0, 1 << 20);
        device.available -= 5000;
        let plan = Plan::new(&tensors, &[], &[device], &placements, &[3000]).unwrap();
        let expected = Fill {
            embeddings: 1280,
            linear: 2048,
            experts: 4096,
            other: 128,
            output_head: 1280,
            scales: 64 + 4 + 128 + 4,
            padding: 12288 - 9032,
            headroom: 3000,
            in_use: 5000,
            free: (1 << 20) - 12288 - 8000,
        };
        assert_eq!(fills(&tensors, &plan), [expected]);
    }

    #[test]
    fn a_device_that_holds_nothing_has_no_more_headroom_than_memory() {
        let plan = Plan::new(&[], &[], &[device(0, 100)], &[], &[u64::MAX]).unwrap();
        let fill = fills(&[], &plan)[0];
        assert_eq!((fill.headroom, fill.free), (100, 0));
    }

    proptest! {
        #[test]
        fn what_fills_a_device_adds_up_to_its_capacity(
            spec in prop::collection::vec(
                (0usize..7, prop::collection::vec(0u64..70, 0..4), any::<bool>(), prop::option::of(0u32..3)),
                0..40,
            ),
            taken in 0u64..1 << 29,
            headroom in 0u64..1 << 29,
        ) {
            let modules = [
                "embed_tokens", "layers.1.mlp.up_proj", "layers.2.experts.5.w1", "norm", "lm_head",
                "layers.1.mlp.gate", "x",
            ];
            let tensors: Vec<TensorInfo> = spec.iter()
                .map(|(module, shape, ..)| tensor(&format!("{}.weight", modules[*module]), shape))
                .collect();
            let placements: Vec<Placement> = spec.iter()
                .map(|&(_, _, stored, device)| Placement {
                    device,
                    format: if stored { Format::Stored } else { Format::NF4_DOUBLE },
                })
                .collect();
            let devices: Vec<_> = (0..3)
                .map(|i| {
                    let mut device = device(i, (1 << 30) + 12345);
                    device.available -= taken;
                    device
                })
                .collect();
            let plan = Plan::new(&tensors, &[], &devices, &placements, &[headroom; 3]).unwrap();
            for (fill, device) in fills(&tensors, &plan).iter().zip(&plan.devices) {
                let sum: u64 = fill.parts().iter().map(|(_, bytes)| bytes).sum();
                prop_assert_eq!(sum, device.device.capacity);
                prop_assert_eq!(fill.headroom, headroom);
                prop_assert_eq!(fill.in_use, taken);
                let weights: u64 = fill.parts()[..6].iter().map(|(_, bytes)| bytes).sum();
                prop_assert_eq!(weights, device.size.requested);
            }
        }
    }
}
