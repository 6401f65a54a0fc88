//! Everything on the first device: NF4 where that is usual, the rest as stored.

use tightfit_guest::names::{TensorKind, kind_of};
use tightfit_guest::{Description, Format, Nf4Format, Placement, Tensor};
use tightfit_guest::{Policy, Proposal, Refusal, Request, policy};

struct FirstDevice;

policy!(FirstDevice);

impl Policy for FirstDevice {
    fn describe() -> Description {
        Description {
            name: "first-device".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            settings: vec![],
        }
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let place = |tensor: &Tensor| Placement {
            device: Some(0),
            format: format(tensor),
        };
        Ok(Proposal {
            placements: request.tensors.iter().map(place).collect(),
            headroom: vec![0; request.devices.len()],
        })
    }
}

fn format(tensor: &Tensor) -> Format {
    match kind_of(tensor) {
        TensorKind::Linear | TensorKind::Expert if tensor.is_quantizable() => {
            Format::Nf4(Nf4Format {
                block_size: 64,
                double_quantized: false,
            })
        }
        _ => Format::Stored,
    }
}
