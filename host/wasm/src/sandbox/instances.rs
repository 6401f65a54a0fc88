//! How many instances a component makes and what they take, counted before it is compiled: the
//! compiler copies a nested component for each time that it is instantiated, so a few lines can ask
//! for billions.

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind,
    ComponentTypeRef, Encoding, Instance, Payload, Result,
};

use super::parts::Parts;

/// Instances, and the bytes that they take besides memories and tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) instances: u64,
    pub(super) bytes: u64,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.instances = self.instances.saturating_add(other.instances);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// A component or module whose parts are being read.
#[derive(Debug, Default)]
struct Open {
    is_component: bool,
    /// Of a module.
    parts: Parts,
    /// What the component makes.
    sum: Sum,
    /// What each component in its index space makes.
    components: Vec<Sum>,
    /// What an instance of each module in its index space takes.
    modules: Vec<Sum>,
}

/// Counts while a binary is read from front to back.
#[derive(Debug, Default)]
pub(super) struct Counter {
    open: Vec<Open>,
    /// What was closed last makes: in the end, all.
    closed: Sum,
    /// Whether components or modules are handed around as values, so that only running it would tell.
    is_uncountable: bool,
    modules: u64,
    laid_out: u64,
}

/// Bytes that an instance of a component takes, besides those of its modules.
const COMPONENT_INSTANCE: u64 = 1 << 10;

impl Counter {
    /// Returns the number of components and modules that have been begun and not ended.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// Returns the sum once everything is read. `None` where it cannot be told.
    pub(super) fn sum(&self) -> Option<Sum> {
        (!self.is_uncountable).then_some(self.closed)
    }

    /// Returns the number of core modules that have been begun.
    pub(super) fn modules(&self) -> u64 {
        self.modules
    }

    /// Returns the elements of tables that are laid out as the modules are compiled, instantiated
    /// or not.
    pub(super) fn laid_out(&self) -> u64 {
        self.laid_out
    }

    /// Takes the next part. What is damaged beyond that is for validation to find.
    pub(super) fn read(&mut self, payload: &Payload<'_>) -> Result<()> {
        match payload {
            Payload::Version { encoding, .. } => {
                let is_component = *encoding == Encoding::Component;
                self.modules += u64::from(!is_component);
                self.open.push(Open {
                    is_component,
                    ..Open::default()
                });
            }
            Payload::End(_) => {
                if let Some(closed) = self.open.pop() {
                    if closed.is_component {
                        self.closed = closed.sum;
                        self.push_component(Some(closed.sum));
                    } else {
                        self.laid_out = self.laid_out.saturating_add(closed.parts.laid_out());
                        self.closed = Sum {
                            instances: 1,
                            bytes: closed.parts.instance_bytes(),
                        };
                        self.push_module(Some(self.closed));
                    }
                }
            }
            Payload::InstanceSection(section) => {
                for instance in section.clone() {
                    if let Instance::Instantiate { module_index, .. } = instance? {
                        self.add(self.module(0, module_index));
                    }
                }
            }
            Payload::ComponentInstanceSection(section) => {
                for instance in section.clone() {
                    if let ComponentInstance::Instantiate {
                        component_index, ..
                    } = instance?
                    {
                        self.add(self.component(0, component_index));
                        self.add(Some(Sum {
                            instances: 1,
                            bytes: COMPONENT_INSTANCE,
                        }));
                    }
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section.clone() {
                    match alias? {
                        ComponentAlias::Outer {
                            kind: ComponentOuterAliasKind::Component,
                            count,
                            index,
                        } => self.push_component(self.component(count, index)),
                        ComponentAlias::Outer {
                            kind: ComponentOuterAliasKind::CoreModule,
                            count,
                            index,
                        } => self.push_module(self.module(count, index)),
                        ComponentAlias::InstanceExport {
                            kind: ComponentExternalKind::Component,
                            ..
                        } => self.push_component(None),
                        ComponentAlias::InstanceExport {
                            kind: ComponentExternalKind::Module,
                            ..
                        } => self.push_module(None),
                        _ => {}
                    }
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section.clone() {
                    match import?.ty {
                        ComponentTypeRef::Component(_) => self.push_component(None),
                        ComponentTypeRef::Module(_) => self.push_module(None),
                        _ => {}
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section.clone() {
                    let export = export?;
                    match export.kind {
                        ComponentExternalKind::Component => {
                            self.push_component(self.component(0, export.index));
                        }
                        ComponentExternalKind::Module => {
                            self.push_module(self.module(0, export.index));
                        }
                        _ => {}
                    }
                }
            }
            part => {
                if let Some(open) = self.open.last_mut() {
                    open.parts.read(part)?;
                }
            }
        }
        Ok(())
    }

    /// Returns what a component makes which is in the index space of the one that many levels
    /// outside of the innermost.
    fn component(&self, outward: u32, index: u32) -> Option<Sum> {
        let level = self.open.len().checked_sub(1 + outward as usize)?;
        self.open[level].components.get(index as usize).copied()
    }

    /// Returns the same of a module.
    fn module(&self, outward: u32, index: u32) -> Option<Sum> {
        let level = self.open.len().checked_sub(1 + outward as usize)?;
        self.open[level].modules.get(index as usize).copied()
    }

    fn push_component(&mut self, made: Option<Sum>) {
        self.is_uncountable |= made.is_none();
        if let Some(open) = self.open.last_mut() {
            open.components.push(made.unwrap_or_default());
        }
    }

    fn push_module(&mut self, made: Option<Sum>) {
        self.is_uncountable |= made.is_none();
        if let Some(open) = self.open.last_mut() {
            open.modules.push(made.unwrap_or_default());
        }
    }

    fn add(&mut self, made: Option<Sum>) {
        self.is_uncountable |= made.is_none();
        if let Some(open) = self.open.last_mut() {
            open.sum.add(made.unwrap_or_default());
        }
    }
}
