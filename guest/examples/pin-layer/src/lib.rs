//! One layer on a device of your choice, everything else on the first device.

use tightfit_guest::names::layer_of;
use tightfit_guest::settings::{Settings, Spec};
use tightfit_guest::{Description, Format, Level, Placement, Policy, Proposal};
use tightfit_guest::{Refusal, Request, log, policy, sizing::Sizer};

const SPECS: &[Spec] = &[
    Spec::new("layer", "0", "Number of the layer to pin."),
    Spec::new("device", "0", "Where it goes: a device's index or name."),
];
struct PinLayer;
policy!(PinLayer);
impl Policy for PinLayer {
    fn describe() -> Description {
        Description::new("pin-layer", "1.0.0", SPECS)
    }
    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let settings = Settings::new(SPECS, &request);
        let (layer, device) = (settings.u32("layer", 0..=9999)?, settings.device("device")?);
        let (mut placements, mut sizer, mut bytes) = (vec![], Sizer::new(), 0u64);
        for tensor in &request.tensors {
            let nf4 = tensor.is_linear() && tensor.is_quantizable();
            let format = if nf4 { Format::NF4 } else { Format::Stored };
            let at = layer_of(&tensor.name).filter(|(stack, _)| stack.ends_with("layers"));
            let pinned = at.is_some_and(|(_, number)| number == layer);
            if pinned {
                bytes = bytes.saturating_add(sizer.size(tensor, format)?.padded);
            }
            placements.push(Placement::on(if pinned { device } else { 0 }, format));
        }
        if bytes == 0 {
            return Err(settings.bad("layer", "the number of a layer of this model"));
        }
        request.check_room(device, &format!("layer {layer}"), bytes)?;
        log(Level::Info, &format!("layer {layer} takes {bytes} bytes"));
        Ok(Proposal::without_headroom(&request, placements))
    }
}
