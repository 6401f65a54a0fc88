//! Everything on the first device: NF4 where that is usual, the rest as stored.

use tightfit_guest::names::{TensorKind, kind_of};
use tightfit_guest::{Description, Format, Nf4Format, Placement, Policy};
use tightfit_guest::{Proposal, Refusal, Request, Tensor, policy};

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
        Ok(Proposal {
            placements: request.tensors.iter().map(place).collect(),
            headroom: vec![0; request.devices.len()],
        })
    }
}

fn place(tensor: &Tensor) -> Placement {
    let (device, block_size, double_quantized) = (Some(0), 64, false);
    let nf4 = Format::Nf4(Nf4Format {
        block_size,
        double_quantized,
    });
    let format = match kind_of(tensor) {
        TensorKind::Linear | TensorKind::Expert if tensor.is_quantizable() => nf4,
        _ => Format::Stored,
    };
    Placement { device, format }
}
